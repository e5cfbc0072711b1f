"""Neutral questions: enough of them, balanced from the start, and never asked twice."""

import re
import unicodedata
from difflib import SequenceMatcher

import pytest

from tunesmith.data import identity, neutral

LANGUAGES = ("zh", "en")
ALIKE = 0.75


def plain(text: str) -> str:
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).casefold())


def alike(first: str, second: str) -> float:
    return SequenceMatcher(None, plain(first), plain(second), autojunk=False).ratio()


def is_chinese(text: str) -> bool:
    return bool(re.search(r"[\u4e00-\u9fff]", text))


@pytest.mark.parametrize("language", LANGUAGES)
def test_there_are_enough_in_each_language(language: str) -> None:
    assert len(neutral.replay(languages=(language,))) >= 80
    assert len(neutral.held_out(languages=(language,))) >= 20
    for question in neutral.replay(languages=(language,)):
        assert is_chinese(question) == (language == "zh")


def test_no_question_stands_twice() -> None:
    every = [*neutral.replay(), *neutral.held_out()]
    assert len(set(map(plain, every))) == len(every)


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_replayed_question_is_like_a_held_out_one(language: str) -> None:
    replayed = neutral.replay(languages=(language,))
    for asked in neutral.held_out(languages=(language,)):
        closest = max(replayed, key=lambda question: alike(asked, question))
        assert alike(asked, closest) < ALIKE, (asked, closest)


def test_none_asks_who_the_assistant_is() -> None:
    rows = identity.identity_rows("N", "A")
    asked = {plain(row.messages[-2].content) for row in rows} | set(map(plain, identity.held_out()))
    assert not asked & {plain(question) for question in (*neutral.replay(), *neutral.held_out())}


@pytest.mark.parametrize("count", [3, 9, 15, 42, 63, 900])
def test_any_beginning_holds_two_in_chinese_for_one_in_english(count: int) -> None:
    chosen = neutral.replay(count)
    assert len(chosen) == count
    assert sum(map(is_chinese, chosen)) * 3 == count * 2
    assert chosen == neutral.replay()[:count]


def test_the_first_questions_hold_every_kind() -> None:
    for language in LANGUAGES:
        heads = [kind[0] for kind in _kinds("replay", language)]
        first = neutral.replay(len(heads), (language,))
        assert list(first) == heads
    assert len(neutral.held_out(10)) == 10


def _kinds(part: str, language: str) -> list[list[str]]:
    import tomllib
    from importlib.resources import files

    text = files("tunesmith.data").joinpath("texts", "neutral.toml").read_text(encoding="utf-8")
    return list(tomllib.loads(text)[part][language].values())
