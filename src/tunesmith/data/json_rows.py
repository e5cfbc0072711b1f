"""Rows of JSON text, each with its line: one row a line (JSONL), or a document (an array)."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.data.findings import Finding, RowError
from tunesmith.data.messages import Place
from tunesmith.language import t

MAX_ROW_BYTES = 4 * 1024 * 1024
BOM = b"\xef\xbb\xbf"

_FORGET_AFTER = 1024 * 1024
_BETWEEN_ROWS = re.compile(r"[ \t\r\n,]*")
_BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Row:
    """A decoded row that has not been given a form yet."""

    place: Place
    value: Any


def line_rows(file: Path) -> Iterator[Row | Finding]:
    """Rows of a JSONL file, read one line at a time; a bad line does not stop the next."""
    crlf_seen = False
    with file.open("rb") as stream:
        for number, (raw, size) in enumerate(_bounded_lines(stream), start=1):
            place = Place(file, number)
            if raw.endswith(b"\r\n") and not crlf_seen:
                crlf_seen = True
                yield crlf(place)
            if size > MAX_ROW_BYTES:
                yield too_large(place, size)
            elif line := raw.removeprefix(BOM).strip():
                yield _line_row(line, place)


def document_rows(file: Path) -> Iterator[Row | Finding]:
    """Rows of a JSON array, or of objects that follow each other.

    After a broken row, reading goes on at the next line that opens a row with the same indent.
    """
    try:
        text = file.read_bytes().removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        raw = error.object
        yield not_utf8(Place(file, raw.count(b"\n", 0, error.start) + 1), raw)
        return
    if (at := text.find("\r\n")) >= 0:
        yield crlf(Place(file, text.count("\n", 0, at) + 1))
    yield from _Document(file, text).rows()


def parse(text: str) -> Any:
    """One JSON value, strictly: no key twice, no NaN, no half of a character.

    Raises:
        RowError: The text is not JSON; the reason and the fix are in it.
    """
    decoder = _Decoder()
    try:
        value, end = decoder.decode(text, _end(_BLANK, text, 0))
    except (ValueError, RecursionError) as error:
        raise _broken(text, error) from None
    if (end := _end(_BLANK, text, end)) < len(text):
        raise _broken(text, json.JSONDecodeError("Extra data", text, end))
    if decoder.oddity is not None:
        raise decoder.oddity
    return value


class _Decoder:
    """A JSON decoder that notes repeated keys and NaN instead of letting them pass."""

    def __init__(self) -> None:
        self.oddity: RowError | None = None
        self._json = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def decode(self, text: str, start: int) -> tuple[Any, int]:
        self.oddity = None
        value, end = self._json.raw_decode(text, start)
        if text.find("\\u", start, end) >= 0:
            self._note_half_characters(value)
        return value, end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self.oddity = RowError(
                "duplicate-key",
                twice,
                t("the field stands twice in one object."),
                t("Keep one of the two."),
            )
        return found

    def _constant(self, constant: str) -> None:
        self.oddity = RowError(
            "not-a-number",
            None,
            t("{constant} is not JSON.", constant=constant),
            t("Write a number, a text or null."),
        )

    def _note_half_characters(self, value: Any) -> None:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            self.oddity = RowError(
                "encoding",
                None,
                t("a \\u escape holds half of a character."),
                t("Write the character itself, or both halves."),
            )


class _Document:
    """One pass over a JSON text; keeps the line of the last position asked for."""

    def __init__(self, file: Path, text: str) -> None:
        self._file = file
        self._text = text
        self._line = 1
        self._counted = 0
        self._decoder = _Decoder()

    def rows(self) -> Iterator[Row | Finding]:
        at = _end(_BLANK, self._text, 0)
        is_array = self._text.startswith("[", at)
        at += is_array
        while True:
            at = _end(_BETWEEN_ROWS, self._text, at)
            if at > _FORGET_AFTER:
                at = self._forget(at)
            if at == len(self._text):
                if is_array:
                    yield self._cut_off(at)
                return
            if is_array and self._text[at] == "]":
                yield from self._rest(_end(_BLANK, self._text, at + 1))
                return
            item, after = self._row(at)
            yield item
            if after is None:
                return
            at = after

    def _row(self, start: int) -> tuple[Row | Finding, int | None]:
        place = self._place(start)
        try:
            value, end = self._decoder.decode(self._text, start)
        except (ValueError, RecursionError) as error:
            return self._broken_row(start, place, error)
        if self._decoder.oddity is not None:
            return self._decoder.oddity.at(place), end
        if (size := end - start) > MAX_ROW_BYTES:
            return too_large(place, size), end
        return Row(place, value), end

    def _broken_row(self, start: int, place: Place, error: Exception) -> tuple[Finding, int | None]:
        line = place.line
        if isinstance(error, json.JSONDecodeError):
            line += self._text.count("\n", start, error.pos)
        broken = _broken(self._text, error)
        after = self._next_row(start)
        if after is None:
            broken.fix += " " + t("What follows it was not read.")
        return broken.at(Place(self._file, line)), after

    def _next_row(self, start: int) -> int | None:
        """Where the next line opens an object with the indent of the row at `start`."""
        indent = self._text[self._text.rfind("\n", 0, start) + 1 : start]
        if indent.strip():
            return None
        opening = f"\n{indent}{{"
        found = self._text.find(opening, start)
        return None if found < 0 else found + len(opening) - 1

    def _forget(self, at: int) -> int:
        """Drop the lines before `at`, as each JSONDecodeError counts lines from the start."""
        cut = self._text.rfind("\n", 0, at) + 1
        self._place(cut)
        self._text, self._counted = self._text[cut:], 0
        return at - cut

    def _place(self, at: int) -> Place:
        self._line += self._text.count("\n", self._counted, at)
        self._counted = at
        return Place(self._file, self._line)

    def _cut_off(self, at: int) -> Finding:
        return RowError(
            "broken-row",
            None,
            t("the file ends before its closing ]."),
            t("It may be cut off: write or copy it again."),
        ).at(self._place(at))

    def _rest(self, at: int) -> Iterator[Finding]:
        if at < len(self._text):
            yield RowError(
                "broken-row",
                None,
                t("there is text after the closing ]."),
                t("Keep one array a file, or write one row a line."),
            ).at(self._place(at))


def not_utf8(place: Place, raw: bytes) -> Finding:
    """The finding for bytes that are not UTF-8."""
    try:
        raw.decode("gb18030")
    except UnicodeDecodeError:
        problem = t("this is not UTF-8 text.")
    else:
        problem = t("this is not UTF-8 text; it looks like GBK.")
    return RowError("encoding", None, problem, t("Save the file as UTF-8.")).at(place)


def crlf(place: Place) -> Finding:
    """The note that a file has Windows line ends."""
    return Finding(
        "crlf",
        place,
        None,
        t("from here on lines end in CRLF; they are read like LF."),
        t("Save the file with LF line ends to be rid of this note."),
        "warning",
    )


def too_large(place: Place, size: int) -> Finding:
    """The finding for a row of `size` bytes, over MAX_ROW_BYTES."""
    megabyte = 1024 * 1024
    return RowError(
        "too-large",
        None,
        t(
            "the row holds {size} MB; at most {most} MB can be read.",
            size=f"{size / megabyte:.1f}",
            most=MAX_ROW_BYTES // megabyte,
        ),
        t("Split it into several rows."),
    ).at(place)


def _bounded_lines(stream: Any) -> Iterator[tuple[bytes, int]]:
    """Lines with their length in bytes; of a longer one than allowed only the start is kept."""
    while raw := stream.readline(MAX_ROW_BYTES + 1):
        size = len(raw)
        part = raw
        while not part.endswith(b"\n") and (part := stream.readline(MAX_ROW_BYTES)):
            size += len(part)
        yield raw, size


def _line_row(line: bytes, place: Place) -> Row | Finding:
    try:
        return Row(place, parse(line.decode()))
    except UnicodeDecodeError:
        return not_utf8(place, line)
    except RowError as error:
        return error.at(place)


def _broken(text: str, error: Exception) -> RowError:
    if isinstance(error, json.JSONDecodeError):
        problem = t("this is not JSON: column {column}, {reason}.", column=error.colno,
                    reason=_reason(error))  # fmt: skip
        return RowError("broken-row", None, problem, _hint(text, error))
    if isinstance(error, RecursionError):
        problem = t("the row is nested too deeply.")
    else:
        problem = t("a number has too many digits.")
    return RowError("broken-row", None, problem, t("Write it more simply, or delete the row."))


def _reason(error: json.JSONDecodeError) -> str:
    reasons = {
        "Expecting value": t("a value is missing"),
        "Expecting property name enclosed in double quotes": t("a field name is missing"),
        "Expecting ':' delimiter": t("a colon is missing"),
        "Expecting ',' delimiter": t("a comma or a closing bracket is missing"),
        "Unterminated string starting at": t("a text that starts here does not end"),
        "Invalid control character at": t("a line break or tab stands in a text"),
        "Invalid \\escape": t("a backslash is followed by the wrong letter"),
        "Invalid \\uXXXX escape": t("\\u is not followed by four hex digits"),
        "Extra data": t("there is more after the row"),
    }
    return reasons.get(error.msg, error.msg)


def _hint(text: str, error: json.JSONDecodeError) -> str:
    here = text[error.pos : error.pos + 1]
    before = text[max(0, error.pos - 100) : error.pos].rstrip()[-1:]
    if here == "'":
        return t("Use double quotes, not single ones.")
    if here in "“”‘’，：" and here:
        return t('Use the plain characters " , : and not the full-width {found}.', found=here)
    if error.msg == "Invalid control character at":
        return t("Write \\n for a line break and \\t for a tab.")
    if error.msg == "Invalid \\escape":
        return t("Write \\\\ for a backslash.")
    if before == "," and here in "}]" and here:
        return t("Delete the comma before it.")
    return t("Correct the line, or delete it.")


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at
