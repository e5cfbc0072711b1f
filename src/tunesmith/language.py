"""What tunesmith says, in the reader's language.

Messages are written in English where they are said: `t("{path} is missing", path=path)`.
Translations lie in `locale/<language>/*.json`, English sentence to translated sentence.
"""

import json
import locale
import os
from contextvars import ContextVar
from functools import cache
from pathlib import Path

LANGUAGES = ("en", "zh")
LOCALE_DIR = Path(__file__).parent / "locale"

_current: ContextVar[str | None] = ContextVar("language", default=None)


def t(message: str, /, **values: object) -> str:
    """The message in the current language, its `{placeholders}` filled from `values`."""
    text = _catalogue(current_language()).get(message, message)
    return text.format(**values) if values else text


def set_language(language: str) -> None:
    """Speak `language` ("en" or "zh") from here on, in this context (thread or task)."""
    if language not in LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(LANGUAGES)}, not {language!r}")
    _current.set(language)


def current_language() -> str:
    """The language set, else that of the environment: TUNESMITH_LANG, then the locale."""
    return _current.get() or _environment_language()


def language_of(text: str) -> str:
    """In which of the languages a text is: zh if it has a Chinese character."""
    return "zh" if any("\u4e00" <= letter <= "\u9fff" for letter in text) else "en"


@cache
def _environment_language() -> str:
    names = ("TUNESMITH_LANG", "LC_ALL", "LC_MESSAGES", "LANG")
    value = next((os.environ[name] for name in names if os.environ.get(name)), None)
    value = value or locale.getlocale()[0] or "en"
    return "zh" if value.lower().startswith(("zh", "chinese")) else "en"


@cache
def _catalogue(language: str) -> dict[str, str]:
    merged: dict[str, str] = {}
    for file in sorted(LOCALE_DIR.joinpath(language).glob("*.json")):
        merged |= json.loads(file.read_text(encoding="utf-8"))
    return merged
