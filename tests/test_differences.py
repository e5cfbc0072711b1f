"""Two answers with what differs marked."""

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.apps.differences import marked

TEXTS = st.text(st.sampled_from("ab_ é1 \n<>&\"'我是小あ한"), max_size=20)


@pytest.mark.parametrize(
    ("before", "after", "left", "right"),
    [
        ("I am a robot.", "I am a smith.", "I am a <del>robot</del>.", "I am a <ins>smith</ins>."),
        ("我是机器", "我是小明", "我是<del>机器</del>", "我是<ins>小明</ins>"),
        ("same", "same", "same", "same"),
        ("", "new", "", "<ins>new</ins>"),
        ("<b>", "<i>", "&lt;<del>b</del>&gt;", "&lt;<ins>i</ins>&gt;"),
    ],
)
def test_what_differs_is_marked(before: str, after: str, left: str, right: str) -> None:
    assert marked(before, after) == (left, right)


@given(TEXTS, TEXTS)
def test_nothing_of_the_texts_is_lost_or_acts(before: str, after: str) -> None:
    for text, shown in zip((before, after), marked(before, after), strict=True):
        without = re.sub(r"</?(?:del|ins)>", "", shown)
        assert "<" not in without and ">" not in without
        assert html.unescape(without) == text
