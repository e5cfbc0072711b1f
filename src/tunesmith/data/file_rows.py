"""The rows of one file as they can be changed and written back, so that none is lost."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from tunesmith.data.convert import as_row
from tunesmith.data.forms import Parsed
from tunesmith.data.json_rows import BOM
from tunesmith.data.messages import Conversation, Message, Role
from tunesmith.data.sources import is_lines, parsed_rows
from tunesmith.errors import UsageError
from tunesmith.language import t
from tunesmith.paths import write_atomic

MOST_BYTES = 32 * 1024 * 1024  # of a file whose rows are held in memory


class Cells(NamedTuple):
    """A single-turn conversation as a person writes it; what is empty is not there."""

    system: str = ""
    user: str = ""
    assistant: str = ""


@dataclass(frozen=True)
class FileRow:
    """One row: the JSON line it is written as, and the conversation it was read as.

    Attributes:
        line: Without its line end; of a JSONL file exactly what stands there.
        number: Where it was read, from 1; None for a row that is new.
        conversation: None if the row cannot be read.
        unused: Fields of the line that nobody reads; they are kept.
    """

    line: bytes
    number: int | None = None
    conversation: Conversation | None = None
    unused: tuple[str, ...] = ()

    @property
    def cells(self) -> Cells | None:
        """What may be edited; None if the row has more turns, tools, or cannot be read."""
        if self.conversation is None or self.conversation.tools or self._has_unused_in_turns:
            return None
        messages = self.conversation.messages
        roles = [message.role for message in messages]
        if roles != [role for role in Cells._fields if role in roles]:
            return None
        if any(message != Message(message.role, message.content) for message in messages):
            return None
        return Cells(**{message.role: message.content for message in messages})

    def with_conversation(self, conversation: Conversation) -> "FileRow":
        """The row with other messages, its unused fields kept."""
        return replace(self, line=self._line(conversation), conversation=conversation)

    def with_cells(self, cells: Cells) -> "FileRow":
        """The row with these texts as its messages."""
        before = self.conversation or Conversation(())
        return self.with_conversation(replace(before, messages=_messages(cells)))

    @property
    def _has_unused_in_turns(self) -> bool:
        return any("[]." in name for name in self.unused)

    def _line(self, conversation: Conversation) -> bytes:
        kept = json.loads(self.line) if self.unused else {}
        more = {name: kept[name] for name in self.unused if name in kept}
        return _json(more | as_row(conversation))


def new_row(cells: Cells) -> FileRow:
    """A row that stands in no file yet."""
    return FileRow(b"").with_cells(cells)


def file_rows(file: Path) -> list[FileRow]:
    """The rows of a file. Of a JSONL file also those that cannot be read; of others only the rest.

    Raises:
        UsageError: The file cannot be opened, or is too large to be held in memory.
    """
    lines = is_lines(file)
    if (size := file.stat().st_size) > MOST_BYTES:
        raise UsageError(
            t(
                "{path} has {size} MB; rows can be changed here up to {most} MB. "
                "Split the file, or change it in an editor.",
                path=file,
                size=size // 1024**2,
                most=MOST_BYTES // 1024**2,
            )
        )
    parsed = [item for item in parsed_rows([file]) if isinstance(item, Parsed)]
    return _line_rows(file, parsed) if lines else [_table_row(item) for item in parsed]


def write_rows(path: Path, rows: Iterable[FileRow]) -> None:
    """Write the rows as JSONL, each line as it is."""
    write_atomic(path, b"".join(row.line + b"\n" for row in rows))


def _line_rows(file: Path, parsed: Iterable[Parsed]) -> list[FileRow]:
    read = {_number(item): item for item in parsed}
    rows = []
    for number, raw in enumerate(file.read_bytes().split(b"\n"), start=1):
        if line := raw.removeprefix(BOM).strip():
            item = read.get(number)
            rows.append(
                FileRow(line, number, item.conversation, item.unused)
                if item is not None
                else FileRow(line, number)
            )
    return rows


def _table_row(item: Parsed) -> FileRow:
    return FileRow(_json(as_row(item.conversation)), _number(item), item.conversation)


def _number(item: Parsed) -> int | None:
    place = item.conversation.place
    return place.line if place is not None else None


def _messages(cells: Cells) -> tuple[Message, ...]:
    roles: tuple[Role, ...] = ("system", "user", "assistant")
    return tuple(
        Message(role, text) for role, text in zip(roles, cells, strict=True) if text.strip()
    )


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
