"""The preview: every token shown once, safely, trained ones marked, cuts counted."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers_templates import FAMILIES, family_tokenizer
from tunesmith.data.messages import Conversation, Message
from tunesmith.data.packs import Sample
from tunesmith.data.preview import Span, lengths, preview_html, spans, summary, visible
from tunesmith.data.render import Renderer


def sample(name: str, question: str, answer: str) -> Sample:
    messages = (Message("user", question), Message("assistant", answer))
    (rendered,) = Renderer(family_tokenizer(name)).sample(Conversation(messages))
    return rendered


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(question=st.text(max_size=20), answer=st.text(max_size=20))
def test_spans_hold_every_token_once_and_all_of_the_text(
    name: str, question: str, answer: str
) -> None:
    tokenizer, rendered = family_tokenizer(name), sample(name, question, answer)
    found = spans(rendered, tokenizer)
    assert tuple(id for span in found for id in span.token_ids) == rendered.input_ids
    assert tuple(span.trained for span in found for _ in span.token_ids) == rendered.trained
    text = tokenizer.decode(rendered.input_ids, skip_special=False)
    assert "".join(span.text for span in found) == visible(text)


def test_a_character_split_over_tokens_is_shown_whole() -> None:
    found = spans(sample("qwen2.5", "Hi", "龘!"), family_tokenizer("qwen2.5"))
    (split,) = [span for span in found if "龘" in span.text]
    assert split.text == "龘"
    assert len(split.token_ids) == 3
    assert found[found.index(split) + 1] == Span("!", True, found[-2].token_ids)


def test_ids_that_are_no_character_are_shown_all_the_same() -> None:
    tokenizer = family_tokenizer("qwen2.5")
    halves = tokenizer.encode("龘")[:2] * 3
    rendered = Sample(tuple(halves), (False,) * 6)
    found = spans(rendered, tokenizer)
    assert tuple(id for span in found for id in span.token_ids) == rendered.input_ids
    assert "\ufffd" in found[0].text


def test_nothing_that_moves_or_hides_is_left() -> None:
    assert visible("a\nb\tc") == "a⏎\nb⇥c"
    assert visible("\x1b[31m\u202ered\x00") == "‹U+001B›[31m‹U+202E›red‹U+0000›"
    family = "\U0001f468\u200d\U0001f469"
    assert visible(family) == family


def test_lengths_count_what_a_limit_cuts() -> None:
    long = Sample((1,) * 10, (False,) * 4 + (True,) * 6)
    short = Sample((1,) * 3, (False,) * 2 + (True,))
    untrained = Sample((1,) * 2, (False,) * 2)
    counted = lengths([long, short, untrained], 5)
    assert (counted.samples, counted.tokens, counted.trained, counted.longest) == (3, 15, 7, 10)
    assert (counted.cut, counted.trained_cut, counted.emptied) == (1, 5, 1)
    assert lengths([long, short], 4).emptied == 1
    assert (lengths([long]).cut, lengths([long]).trained_cut) == (0, 0)
    assert lengths([]).longest == 0


def test_the_summary_says_what_is_cut_and_what_is_empty() -> None:
    untrained = Sample((1,) * 9, (False,) * 9)
    lines = " ".join(summary(lengths([untrained], 5)))
    assert "A limit of 5 tokens cuts 1 samples and 0 trained tokens." in lines
    assert "1 samples have nothing to train." in lines


class Page(HTMLParser):
    """What a browser would make of the page: tags, and the text of the tokens."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag in ("span", "s") and "title" in dict(attrs)

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        self.text += data if self._inside else ""


EVIL = "<script>alert(1)</script><img src=https://x.example/a.png onerror=alert(1)>]]>--></pre>"


def test_the_page_is_inert_and_loads_nothing() -> None:
    rendered = sample("smollm2", EVIL, f"[x](javascript:alert(1)) {EVIL}")
    page = preview_html([rendered], family_tokenizer("smollm2"), title=EVIL)
    parsed = Page(page)
    frame = {"html", "head", "meta", "title", "style", "body"}
    content = {"h1", "h2", "ul", "li", "p", "pre", "span", "s"}
    assert {tag for tag, _ in parsed.tags} <= frame | content
    names = {name for _, attributes in parsed.tags for name in attributes}
    assert names <= {"lang", "charset", "http-equiv", "content", "name", "class", "title"}
    assert "default-src 'none'" in page
    assert not re.search(r"url\(|@import", page)
    assert parsed.text.count(EVIL) == 2


def test_the_page_marks_trained_and_cut_tokens() -> None:
    rendered = sample("smollm2", "Who are you?", "I am Ming.")
    limit = len(rendered.input_ids) - 2
    page = preview_html([rendered], family_tokenizer("smollm2"), title="rows", max_length=limit)
    tokens = [(tag, attributes) for tag, attributes in Page(page).tags if "title" in attributes]
    shown = [(len((a["title"] or "").split()), "class" in a, tag == "s") for tag, a in tokens]
    assert sum(count for count, _, _ in shown) == len(rendered.input_ids)
    assert sum(count for count, trained, _ in shown if trained) == sum(rendered.trained)
    assert sum(count for count, _, cut in shown if cut) == 2
    assert f"A limit of {limit} tokens cuts 1 samples and 2 trained tokens." in page
