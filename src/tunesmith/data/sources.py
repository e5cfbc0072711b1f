"""Training files become conversations: JSON, JSONL, CSV and Parquet, told apart by content."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tunesmith.data.findings import Finding, RowError
from tunesmith.data.forms import Parsed, parse_row
from tunesmith.data.json_document import document_rows
from tunesmith.data.json_rows import BOM, Row, line_rows
from tunesmith.data.messages import Conversation, Place
from tunesmith.data.table_rows import csv_rows, delimiter_of, parquet_rows
from tunesmith.errors import UsageError
from tunesmith.language import t

_HEAD_BYTES = 64 * 1024
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_LINE_SUFFIXES = {".jsonl", ".ndjson"}

RowReader = Callable[[Path], Iterator[Row | Finding]]


def read(files: Sequence[Path]) -> Iterator[Conversation | Finding]:
    """Every row of the files in order: a conversation, or a finding where it cannot be read.

    All are streamed: what is held is a part of the file, as long as its longest row.

    Raises:
        UsageError: A file is missing, is a folder, or may not be opened.
    """
    return (item.conversation if isinstance(item, Parsed) else item for item in parsed_rows(files))


def parsed_rows(files: Sequence[Path]) -> Iterator[Parsed | Finding]:
    """Like `read`, each conversation with the fields its messages were read from."""
    seen: set[tuple[Path, str]] = set()
    return (found for item in raw_rows(files) for found in _noted(item, seen))


def raw_rows(files: Sequence[Path]) -> Iterator[Row | Finding]:
    """Like `read`, each row as it stands; `parsed` gives it a form."""
    require_files(files)
    return (item for file in files for item in _file_rows(file))


def require_files(files: Sequence[Path]) -> None:
    """Refuse what cannot be opened.

    Raises:
        UsageError: A file is missing, is a folder, or may not be opened.
    """
    for file in files:
        _require_file(file)


def parsed(item: Row | Finding) -> Parsed | Finding:
    """The row as a conversation, or what is wrong with it."""
    if isinstance(item, Finding):
        return item
    try:
        return parse_row(item.value, item.place)
    except RowError as error:
        return error.at(item.place)


def is_lines(file: Path) -> bool:
    """Whether each line of the file is a row of its own (JSONL), whatever its name.

    Raises:
        UsageError: The file is missing, is a folder, or may not be opened.
    """
    _require_file(file)
    return _reader(file, _head(file)) is line_rows


def _noted(item: Row | Finding, seen: set[tuple[Path, str]]) -> Iterator[Parsed | Finding]:
    """The parsed row, after a note on each field that nobody reads and that is new."""
    found = parsed(item)
    if isinstance(found, Parsed):
        yield from _unused(found, item.place, seen)
    yield found


def _file_rows(file: Path) -> Iterator[Row | Finding]:
    is_empty = True
    for item in _content(file):
        is_empty &= isinstance(item, Finding) and not item.is_error
        yield item
    if is_empty:
        yield RowError(
            "empty-file", None, t("the file holds no rows."), t("Leave it out, or add rows.")
        ).at(Place(file, 1))


def _content(file: Path) -> Iterator[Row | Finding]:
    head = _head(file)
    if head.startswith(BOM):
        yield _byte_order_mark(file)
    reader = _reader(file, head)
    if isinstance(reader, Finding):
        yield reader
    else:
        yield from reader(file)


def _head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(_HEAD_BYTES)


def _reader(file: Path, head: bytes) -> RowReader | Finding:
    if head.startswith(b"PAR1"):
        return parquet_rows
    if head.startswith(_UTF16):
        return RowError(
            "encoding", None, t("this is UTF-16, not UTF-8."), t("Save the file as UTF-8.")
        ).at(Place(file, 1))
    text = head.removeprefix(BOM).lstrip()
    reader = None if b"\0" in head else _text_reader(file, text)
    return reader or _unsupported(file)


def _text_reader(file: Path, text: bytes) -> RowReader | None:
    first_line = text.partition(b"\n")[0].strip()
    if text.startswith(b"["):
        return document_rows
    if text.startswith(b"{"):
        return line_rows if _opens_lines(file, first_line) else document_rows
    if file.suffix in {".csv", ".tsv"} or delimiter_of(first_line.decode(errors="replace")):
        return csv_rows
    return line_rows if not text or file.suffix in _LINE_SUFFIXES | {".json"} else None


def _opens_lines(file: Path, first_line: bytes) -> bool:
    """Whether each line is a row of its own, rather than part of an indented object."""
    if first_line == b"{":
        return False
    return first_line.endswith(b"}") or file.suffix in _LINE_SUFFIXES


def _unused(row: Parsed, place: Place, seen: set[tuple[Path, str]]) -> Iterator[Finding]:
    for name in row.unused:
        if (place.file, name) not in seen:
            seen.add((place.file, name))
            yield Finding(
                "unused-field",
                place,
                name,
                t("the field is not used, here and in later rows."),
                t("Check its spelling, or leave it if it is only a note."),
                "warning",
            )


def _byte_order_mark(file: Path) -> Finding:
    return Finding(
        "byte-order-mark",
        Place(file, 1),
        None,
        t("the file starts with a byte order mark; it is ignored."),
        t("Save as UTF-8 without BOM to be rid of this note."),
        "warning",
    )


def _unsupported(file: Path) -> Finding:
    return RowError(
        "unsupported-file",
        None,
        t("this is not JSON, JSONL, CSV or Parquet."),
        t("Save it as one of the four; a CSV file needs a first line that names its fields."),
    ).at(Place(file, 1))


def _require_file(file: Path) -> None:
    if file.is_dir():
        raise UsageError(
            t("{path} is a folder; name the files in it, such as {path}/*.jsonl.", path=file)
        )
    if not file.exists():
        raise UsageError(t("{path} does not exist; check the path.", path=file))
    try:
        file.open("rb").close()
    except OSError as error:
        raise UsageError(
            t("{path} cannot be opened: {reason}.", path=file, reason=error.strerror)
        ) from error
