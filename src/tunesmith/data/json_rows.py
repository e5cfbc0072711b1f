"""Rows of JSON Lines: one row a line, each with its number."""

import codecs
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

LOOKED_BACK = 100  # characters before an error that tell what to do about it
BLANK = re.compile(r"[ \t\r\n]*")


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


def parse(text: str) -> Any:
    """One JSON value, strictly: no key twice, no NaN, no half of a character.

    Raises:
        RowError: The text is not JSON; the reason and the fix are in it.
    """
    decoder = Decoder()
    try:
        value, end = decoder.decode(text, match_end(BLANK, text, 0))
    except (ValueError, RecursionError) as error:
        raise broken_row(text, error) from None
    if (end := match_end(BLANK, text, end)) < len(text):
        raise broken_row(text, json.JSONDecodeError("Extra data", text, end))
    if decoder.oddity is not None:
        raise decoder.oddity
    return value


class Decoder:
    """A JSON decoder that notes repeated keys and NaN instead of letting them pass."""

    def __init__(self) -> None:
        self.oddity: RowError | None = None
        self._json = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def decode(self, text: str, start: int) -> tuple[Any, int]:
        """The value at `start` and where it ends; `oddity` says what should not be in it.

        Raises:
            ValueError: It is not JSON, or a number has too many digits.
            RecursionError: It is nested too deeply.
        """
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


def not_utf8(place: Place, raw: bytes) -> Finding:
    """The finding for bytes that are not UTF-8."""
    try:
        codecs.getincrementaldecoder("gb18030")().decode(raw)  # its last character may be cut
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


def broken_row(text: str, error: Exception, gone: int = 0) -> RowError:
    """The error of a row; so many characters of the text's first line are not in `text`."""
    if isinstance(error, json.JSONDecodeError):
        column = error.colno + (gone if error.lineno == 1 else 0)
        problem = t("this is not JSON: column {column}, {reason}.", column=column,
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
    before = text[max(0, error.pos - LOOKED_BACK) : error.pos].rstrip()[-1:]
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


def match_end(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where the match at `at` ends; `at` itself if there is none."""
    match = pattern.match(text, at)
    return match.end() if match else at
