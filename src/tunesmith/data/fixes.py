"""What is wrong with a file and can be put right without asking: nothing is guessed."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tunesmith.data.checks import CONTROL_CHARACTER, Checker
from tunesmith.data.file_rows import FileRow
from tunesmith.data.findings import Finding, Kind
from tunesmith.data.messages import Conversation, Message

OF_THE_FILE: frozenset[Kind] = frozenset({"byte-order-mark", "crlf"})

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal; without its ESC it would stay as text
_LINE_END = re.compile(r"\r\n?|[\v\f]")


@dataclass(frozen=True)
class Fixed:
    """The rows put right, and how many things were: rows changed, rows left out, file notes."""

    rows: tuple[FileRow, ...]
    count: int


def fix(rows: Sequence[FileRow], findings: Iterable[Finding] = ()) -> Fixed:
    """Put right what is certain; every other row stays the line it is.

    Copies and rows without any text are left out. Control characters, empty system turns and
    turns after the last answer, which nothing is trained on, are deleted. Among the `findings`
    of the file, its byte order mark and its CRLF count: `write_rows` writes neither.
    """
    checker = Checker()
    kept = []
    changed = 0
    for row in rows:
        better = _fixed(row)
        if better is None or _is_copy(better, checker):
            changed += 1
            continue
        kept.append(better)
        changed += better is not row
    return Fixed(tuple(kept), changed + sum(found.kind in OF_THE_FILE for found in findings))


def _fixed(row: FileRow) -> FileRow | None:
    """The row, itself if there is nothing to do; None if it has no text at all."""
    if row.conversation is None:
        return row
    messages = _without_loose_ends([_clean(message) for message in row.conversation.messages])
    if all(_is_empty(message) for message in messages):
        return None
    if messages == row.conversation.messages:
        return row
    return row.with_conversation(replace(row.conversation, messages=messages))


def _without_loose_ends(messages: Sequence[Message]) -> tuple[Message, ...]:
    kept = [one for one in messages if not (one.role == "system" and _is_empty(one))]
    answers = [place for place, one in enumerate(kept) if one.role == "assistant"]
    return tuple(kept[: answers[-1] + 1] if answers else kept)


def _clean(message: Message) -> Message:
    if not CONTROL_CHARACTER.search(message.content):
        return message
    text = _LINE_END.sub("\n", _COLOUR.sub("", message.content))
    return replace(message, content=CONTROL_CHARACTER.sub("", text))


def _is_empty(message: Message) -> bool:
    return not message.content.strip() and not message.tool_calls


def _is_copy(row: FileRow, checker: Checker) -> bool:
    conversation: Conversation | None = row.conversation
    return conversation is not None and any(
        found.kind == "duplicate" for found in checker.examine(conversation)
    )
