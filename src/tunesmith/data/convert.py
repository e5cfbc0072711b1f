"""Any accepted form becomes one clean file of messages, whole or split in two."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.data.checks import question_key, scan
from tunesmith.data.findings import Finding
from tunesmith.data.messages import Conversation
from tunesmith.errors import DataError, UsageError
from tunesmith.language import t
from tunesmith.paths import write_atomic


@dataclass(frozen=True)
class Converted:
    """What was written where, and what was left out and why."""

    rows: int
    held_out: int
    path: Path
    held_out_path: Path | None
    left_out: tuple[Finding, ...]


def convert(
    files: Sequence[Path],
    out: Path,
    *,
    holdout: float = 0.0,
    seed: int = 42,
    overwrite: bool = False,
) -> Converted:
    """Write the good rows of `files` to `out` as messages, one a line.

    Rows with an error and exact copies are left out and reported. With `holdout`, that share of
    the rows goes to a second file, `NAME.held-out.jsonl`.

    Raises:
        UsageError: A file cannot be opened, or `out` exists and may not be overwritten.
        DataError: No row is good.
    """
    held_out_path = out.with_name(f"{out.stem}.held-out.jsonl") if holdout else None
    for path in (out, held_out_path):
        if path is not None:
            _require_writable(path, files, overwrite)
    rows: list[Conversation] = []
    left_out: list[Finding] = []
    for conversation, findings in scan(files):
        reasons = [found for found in findings if found.is_error or found.kind == "duplicate"]
        left_out += reasons
        if conversation is not None and not reasons:
            rows.append(conversation)
    if not rows:
        raise DataError(t("No row is good; type `tunesmith data check` to see what is wrong."))
    kept, held_out = split(rows, holdout, seed=seed)
    write_messages(out, kept, overwrite=overwrite)
    if held_out_path is not None:
        write_messages(held_out_path, held_out, overwrite=overwrite)
    return Converted(len(kept), len(held_out), out, held_out_path, tuple(left_out))


def split(
    rows: Sequence[Conversation], share: float, *, seed: int = 42
) -> tuple[list[Conversation], list[Conversation]]:
    """Rows to train on, and about `share` of them held out; the order is kept.

    Rows that ask the same stay together, so no held-out question is trained on. With a share
    above 0 and at least two different questions, both parts get a row.
    """
    asked = [question_key(row) for row in rows]
    times = Counter(asked)
    places = chosen_questions(list(times.values()), share, seed=seed)
    keys = list(times)
    chosen = {keys[place] for place in places}
    parts: tuple[list[Conversation], list[Conversation]] = ([], [])
    for row, key in zip(rows, asked, strict=True):
        parts[key in chosen].append(row)
    return parts


def chosen_questions(
    times: Sequence[int], share: float, *, seed: int, most: int | None = None
) -> list[int]:
    """Which questions to hold out, of those asked so many `times`, in the order of the rows.

    Their rows are about `share` of all, and about `most` at most. One question is always left.
    """
    from tunesmith.data.shuffle import shuffled

    rows = sum(times)
    wanted = max(1, round(share * rows)) if share > 0 else 0
    wanted = wanted if most is None else min(wanted, most)
    chosen: list[int] = []
    for place in islice(shuffled(len(times), seed), max(0, len(times) - 1)):
        if wanted <= 0:
            break
        if times[place] <= wanted or not chosen:
            chosen.append(place)
            wanted -= times[place]
    return chosen


def write_messages(path: Path, rows: Iterable[Conversation], *, overwrite: bool = False) -> None:
    """Write conversations as OpenAI messages, one a line; `sources.read` gives them back.

    Raises:
        UsageError: `path` exists and may not be overwritten, or is a folder.
    """
    _require_writable(path, (), overwrite)
    lines = [json.dumps(as_row(row), ensure_ascii=False) + "\n" for row in rows]
    write_atomic(path, "".join(lines))


def as_row(conversation: Conversation) -> dict[str, Any]:
    """The conversation as a messages row."""
    row: dict[str, Any] = {"messages": [message.as_dict() for message in conversation.messages]}
    if conversation.tools:
        row["tools"] = list(conversation.tools)
    if conversation.identity is not None:
        row["identity"] = {
            "name": conversation.identity.name,
            "author": conversation.identity.author,
        }
    return row


def _require_writable(path: Path, files: Sequence[Path], overwrite: bool) -> None:
    if path.is_dir():
        raise UsageError(t("{path} is a folder; name a file.", path=path))
    if any(path.resolve() == file.resolve() for file in files):
        raise UsageError(t("{path} is read from; name another file to write.", path=path))
    if path.exists() and not overwrite:
        raise UsageError(
            t("{path} exists already; name another file, or add --overwrite.", path=path)
        )
