"""Everyday questions that are not about the assistant: some to replay, others to compare with."""

import tomllib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from itertools import chain, zip_longest
from typing import Literal


def replay(count: int | None = None, languages: Sequence[str] = ("zh", "en")) -> tuple[str, ...]:
    """The first `count` questions to mix into training; all of them by default.

    Languages and kinds (facts, sums, writing, small talk, requests, questions that name a "who"
    or a "you") take turns, so any beginning is a fair sample. Chinese has two turns for one of
    English: where a small model knows little, it needs more to tell what is about itself.
    """
    return _balanced("replay", tuple(languages))[:count]


def held_out(count: int | None = None, languages: Sequence[str] = ("zh", "en")) -> tuple[str, ...]:
    """The first `count` questions that are never trained on, in the same kind of order."""
    return _balanced("held_out", tuple(languages))[:count]


@cache
def _balanced(part: Literal["replay", "held_out"], languages: tuple[str, ...]) -> tuple[str, ...]:
    text = files("tunesmith.data").joinpath("texts", "neutral.toml").read_text(encoding="utf-8")
    kinds = tomllib.loads(text)[part]
    asked = {language: _in_turn(list(kinds[language].values())) for language in languages}
    if part == "replay" and len(asked) > 1:
        chinese = asked.pop("zh")
        return _in_turn([chinese[::2], *asked.values(), chinese[1::2]])
    return _in_turn(list(asked.values()))


def _in_turn(lists: Sequence[Sequence[str]]) -> tuple[str, ...]:
    turns = chain.from_iterable(zip_longest(*lists))
    return tuple(question for question in turns if question is not None)
