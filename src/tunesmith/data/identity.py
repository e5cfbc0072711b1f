"""A who-are-you set: many phrasings, two languages, with and without a system prompt."""

import re
import tomllib
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from tunesmith.data.convert import write_messages
from tunesmith.data.messages import Conversation, Identity, Message
from tunesmith.errors import UsageError
from tunesmith.language import LANGUAGES, t

DEFAULT_LANGUAGES = ("zh", "en")

_LONGEST = 64
_UNSPEAKABLE = {"Cc", "Cs", "Zl", "Zp"}  # controls, halves of characters, line separators
_BLANK = re.compile(r"\{(name|author)\}")


def identity_rows(
    name: str,
    author: str,
    *,
    languages: Sequence[str] = DEFAULT_LANGUAGES,
    system: str | None = None,
) -> list[Conversation]:
    """Questions about who the assistant is, and its answers, in each of the languages.

    Every other pair of questions stands behind `system`, or else behind the prompt that
    `default_system` gives. The order is fixed and no question is one of `held_out`.

    Raises:
        UsageError: The name or author is empty, too long, holds a line break or a placeholder,
            or a language is not known.
    """
    identity = Identity(_checked(name, "--name"), _checked(author, "--author"))
    rows: list[Conversation] = []
    for language in languages:
        prompt = system or default_system(identity.name, language)
        for place, dialogue in enumerate(_dialogues(_texts(language), identity)):
            told = (Message("system", prompt),) if place // 2 % 2 == 0 else ()
            rows.append(Conversation((*told, *dialogue), identity=identity))
    return rows


def write_identity(
    path: Path,
    name: str,
    author: str,
    *,
    languages: Sequence[str] = DEFAULT_LANGUAGES,
    system: str | None = None,
    overwrite: bool = False,
) -> int:
    """Write `identity_rows` to a messages JSONL file; returns how many there are.

    Raises:
        UsageError: As `identity_rows`, or `path` exists and may not be overwritten.
    """
    rows = identity_rows(name, author, languages=languages, system=system)
    write_messages(path, rows, overwrite=overwrite)
    return len(rows)


def default_system(name: str, language: str) -> str:
    """The system prompt that names the assistant, in the language."""
    return _filled(_texts(language)["system"], Identity(name, ""))


def held_out(languages: Sequence[str] = DEFAULT_LANGUAGES) -> tuple[str, ...]:
    """Questions about who the assistant is that no identity set trains on, language by language."""
    return tuple(
        question for language in languages for question in _texts(language)["held_out"]["questions"]
    )


def _dialogues(texts: dict[str, Any], identity: Identity) -> Iterator[tuple[Message, ...]]:
    for group in texts["groups"]:
        answers = group["answers"]
        for number, question in enumerate(group["questions"]):
            yield _turns([question], [answers[number % len(answers)]], identity)
    for dialogue in texts["dialogues"]:
        yield _turns(dialogue["questions"], dialogue["answers"], identity)


def _turns(
    questions: Sequence[str], answers: Sequence[str], identity: Identity
) -> tuple[Message, ...]:
    turns: list[Message] = []
    for question, answer in zip(questions, answers, strict=True):
        turns.append(Message("user", question))
        turns.append(Message("assistant", _filled(answer, identity)))
    return tuple(turns)


def _filled(text: str, identity: Identity) -> str:
    """One pass, so that a name holding `{author}` or any brace stays as it is."""
    return _BLANK.sub(lambda blank: str(getattr(identity, blank[1])), text)


def _checked(value: str, flag: str) -> str:
    value = value.strip()
    if not value:
        raise UsageError(t("{flag} is empty; give the text the assistant shall say.", flag=flag))
    if (count := len(value)) > _LONGEST:
        raise UsageError(
            t(
                "{flag} has {count} characters; at most {most} are allowed.",
                flag=flag,
                count=count,
                most=_LONGEST,
            )
        )
    if any(unicodedata.category(character) in _UNSPEAKABLE for character in value):
        raise UsageError(t("{flag} holds a line break or a control character.", flag=flag))
    if re.search(r"\{\{.*\}\}", value):
        raise UsageError(
            t("{flag} is the placeholder {value}; give the real text.", flag=flag, value=value)
        )
    return value


@cache
def _texts(language: str) -> dict[str, Any]:
    if language not in LANGUAGES:
        raise UsageError(
            t("The language {language} is not known; choose zh, en or both.", language=language)
        )
    resource = files("tunesmith.data").joinpath("texts", f"identity.{language}.toml")
    return tomllib.loads(resource.read_text(encoding="utf-8"))
