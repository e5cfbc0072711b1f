"""Rows of a JSON document, an array or objects that follow each other, each with its line."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tunesmith.data.findings import Finding, RowError
from tunesmith.data.json_rows import (
    BLANK,
    LOOKED_BACK,
    MAX_ROW_BYTES,
    Decoder,
    Row,
    broken_row,
    crlf,
    match_end,
    not_utf8,
    too_large,
)
from tunesmith.data.messages import Place
from tunesmith.language import t

_PIECE = 1024 * 1024  # bytes read at once
_FORGET_AFTER = 1024 * 1024  # characters
_LONGEST_WORD = 16  # characters: -Infinity, or half an escaped emoji
_BETWEEN_ROWS = re.compile(r"[ \t\r\n,]*")


def document_rows(file: Path) -> Iterator[Row | Finding]:
    """Rows of a JSON array, or of objects that follow each other, read a piece at a time.

    After a broken row, reading goes on at the next line that opens a row with the same indent.
    """
    with file.open("rb") as stream:
        text = _Text(file, stream)
        try:
            yield from _Document(file, text).rows()
        except UnicodeDecodeError as error:
            yield not_utf8(text.place(error), error.object)


class _Text:
    """A file's text, decoded a piece at a time."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self._file = file
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._lines = 1  # begun in the pieces so far
        self._ends_in_cr = False
        self.crlf: Finding | None = None
        self.is_read = False

    def piece(self, size: int) -> str:
        """The next `size` bytes or less; empty at the end.

        Raises:
            UnicodeDecodeError: They are not UTF-8.
        """
        raw = self._stream.read(size)
        self.is_read = not raw
        piece = self._decoder.decode(raw, final=self.is_read)
        if self.crlf is None:
            whole = "\r" * self._ends_in_cr + piece
            if (at := whole.find("\r\n")) >= 0:
                self.crlf = crlf(Place(self._file, self._lines + whole.count("\n", 0, at)))
        self._ends_in_cr = piece.endswith("\r")
        self._lines += piece.count("\n")
        return piece

    def place(self, error: UnicodeDecodeError) -> Place:
        """Where the piece that cannot be decoded goes wrong."""
        return Place(self._file, self._lines + error.object.count(b"\n", 0, error.start))


class _Document:
    """One pass over a JSON text, of which only a window is held.

    Keeps the line of the last position asked for, and how much of the window's first line is gone.
    """

    def __init__(self, file: Path, source: _Text) -> None:
        self._file = file
        self._source = source
        self._text = ""
        self._line = 1
        self._counted = 0
        self._gone = 0
        self._decoder = Decoder()

    def rows(self) -> Iterator[Row | Finding]:
        at = self._after(BLANK, 0)
        is_array = self._text.startswith("[", at)
        at += is_array
        crlf_said = False
        while True:
            at = self._after(_BETWEEN_ROWS, at)
            if at > _FORGET_AFTER:
                at = self._forget(at)
            if not crlf_said and self._source.crlf is not None:
                crlf_said = True
                yield self._source.crlf
            if at == len(self._text):
                if is_array:
                    yield self._cut_off(at)
                return
            if is_array and self._text[at] == "]":
                yield from self._rest(self._after(BLANK, at + 1))
                return
            item, after = self._row(at)
            yield item
            if after is None:
                return
            at = after

    def _row(self, start: int) -> tuple[Row | Finding, int | None]:
        place = self._place(start)
        try:
            value, end = self._decoded(start)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            return self._broken_row(start, place, error)
        if self._decoder.oddity is not None:
            return self._decoder.oddity.at(place), end
        if (size := end - start) > MAX_ROW_BYTES:
            return too_large(place, size), end
        return Row(place, value), end

    def _decoded(self, start: int) -> tuple[Any, int]:
        """The value at `start` and where it ends, the window made as long as it takes."""
        while True:
            try:
                value, end = self._decoder.decode(self._text, start)
            except json.JSONDecodeError as error:
                if not _may_be_cut(error, self._text) or not self._read_more():
                    raise
            else:
                if end < len(self._text) or not self._read_more():
                    return value, end

    def _broken_row(self, start: int, place: Place, error: Exception) -> tuple[Finding, int | None]:
        line = place.line
        if isinstance(error, json.JSONDecodeError):
            line += self._text.count("\n", start, error.pos)
        broken = broken_row(self._text, error, self._gone)
        after = self._next_row(start)
        if after is None:
            broken.fix += " " + t("What follows it was not read.")
        return broken.at(Place(self._file, line)), after

    def _next_row(self, start: int) -> int | None:
        """Where the next line opens an object with the indent of the row at `start`."""
        line_start = self._text.rfind("\n", 0, start) + 1
        indent = self._text[line_start:start]
        if indent.strip() or (self._gone and not line_start):
            return None
        opening = f"\n{indent}{{"
        at = start
        while (found := self._text.find(opening, at)) < 0:
            at = max(at, len(self._text) - len(opening) + 1)
            if at > _FORGET_AFTER:
                at = self._forget(at)
            if not self._read_more():
                return None
        return found + len(opening) - 1

    def _after(self, pattern: re.Pattern[str], at: int) -> int:
        """Where the pattern that matches at `at` ends."""
        while (at := match_end(pattern, self._text, at)) == len(self._text) and self._read_more():
            if at > _FORGET_AFTER:
                at = self._forget(at)
        return at

    def _read_more(self) -> bool:
        """Make the window longer; False at the end of the file."""
        if self._source.is_read:
            return False
        # at least as much again, or a long row would be decoded over and over
        self._text += self._source.piece(max(_PIECE, len(self._text)))
        return True

    def _forget(self, at: int) -> int:
        """Drop what lies well before `at`, if possible whole lines; returns where `at` is then."""
        needed = at - LOOKED_BACK
        line_start = self._text.rfind("\n", 0, needed) + 1
        cut = line_start if needed - line_start <= _FORGET_AFTER else needed
        self._place(max(cut, self._counted))
        self._gone = cut - line_start + (0 if line_start else self._gone)
        self._text, self._counted = self._text[cut:], self._counted - cut
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


def _may_be_cut(error: json.JSONDecodeError, text: str) -> bool:
    """Whether more text might mend the error: it lies at the end, or in a text without one."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - _LONGEST_WORD
