"""Reading what a test wrote."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tunesmith.data.checks import Errors, scan
from tunesmith.data.findings import Finding
from tunesmith.data.messages import Conversation
from tunesmith.data.sources import read

ROW = {"instruction": "问", "input": "", "output": "答"}

Save = Callable[[str, str | bytes], Path]


def conversations(*files: Path) -> list[Conversation]:
    items = list(read(files))
    bad = [item for item in items if isinstance(item, Finding) and item.is_error]
    assert not bad
    return [item for item in items if isinstance(item, Conversation)]


def findings(*files: Path) -> list[Finding]:
    return [item for item in read(files) if isinstance(item, Finding)]


def lines(*files: Path) -> list[int]:
    return [row.place.line for row in conversations(*files) if row.place is not None]


def turns(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def load(files: Sequence[Path], held_out: Sequence[Path] = ()) -> list[Conversation]:
    """The plain way to what is trained on: everything in memory, errors refused at the end."""
    rows, errors = [], Errors()
    for conversation, found in scan(files, held_out):
        errors.add(found)
        rows += [] if conversation is None else [conversation]
    errors.require_none([*files, *held_out])
    return rows
