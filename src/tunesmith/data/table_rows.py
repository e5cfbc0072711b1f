"""Rows of tables, CSV and Parquet, each with its line or row number."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tunesmith.data.findings import Finding, RowError
from tunesmith.data.forms import form_of, unknown_form
from tunesmith.data.json_rows import BOM, MAX_ROW_BYTES, Row, not_utf8
from tunesmith.data.messages import Place
from tunesmith.language import t

_DELIMITERS = ",\t;"
_BUFFER = 1024 * 1024  # bytes of a Parquet column read at once


def delimiter_of(header: str) -> str | None:
    """The delimiter that makes the first line of a CSV file a header of a known form."""
    for delimiter in _DELIMITERS:
        try:
            names = next(csv.reader([header], delimiter=delimiter), [])
        except csv.Error:
            continue
        if form_of([name.strip() for name in names]) is not None:
            return delimiter
    return None


def csv_rows(file: Path) -> Iterator[Row | Finding]:
    """Rows of a CSV file with a header; the delimiter is a comma, a tab or a semicolon.

    Reading stops at the first row that is not CSV: what follows cannot be told apart.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    with file.open("rb") as stream:
        first = stream.readline(MAX_ROW_BYTES).removeprefix(BOM)
        delimiter = delimiter_of(first.decode(errors="replace")) or ","
        stream.seek(0)
        yield from _table(file, csv.reader(_decoded(stream), delimiter=delimiter, strict=True))


def parquet_rows(file: Path) -> Iterator[Row | Finding]:
    """Rows of a Parquet file, numbered from 1, read a few at a time."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        # as a stream: else the columns of a whole row group are held
        with ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False) as table:
            names = table.schema_arrow.names
            if form_of(names) is None:
                yield unknown_form(names).at(Place(file, 1))
                return
            for batch in table.iter_batches(batch_size=256):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(Place(file, number), value)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        yield RowError(
            "broken-row",
            None,
            t("the Parquet file cannot be read from here on: {reason}.", reason=_short(error)),
            t("It may be damaged or cut off: write or copy it again."),
        ).at(Place(file, number + 1))


def _table(file: Path, reader: Any) -> Iterator[Row | Finding]:
    start = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        if form_of(header) is None:
            yield unknown_form(header).at(Place(file, start))
            return
        start = reader.line_num + 1
        for cells in reader:
            if cells:
                yield _table_row(header, cells, Place(file, start))
            start = reader.line_num + 1
    except UnicodeDecodeError as error:
        yield not_utf8(Place(file, reader.line_num + 1), error.object)
    except csv.Error as error:
        yield _not_csv(Place(file, start), error)


def _table_row(header: Sequence[str], cells: Sequence[str], place: Place) -> Row | Finding:
    if len(cells) == len(header):
        return Row(place, dict(zip(header, cells, strict=True)))
    return RowError(
        "broken-row",
        None,
        t(
            "the row has {found} cells and the header {expected}.",
            found=len(cells),
            expected=len(header),
        ),
        t("Put a cell that holds the delimiter or a line break in double quotes."),
    ).at(place)


def _decoded(stream: Iterable[bytes]) -> Iterator[str]:
    for number, raw in enumerate(stream):
        yield (raw if number else raw.removeprefix(BOM)).decode()


def _not_csv(place: Place, error: csv.Error) -> Finding:
    if "field limit" in str(error):
        problem = t("a cell is larger than {most} MB.", most=MAX_ROW_BYTES // 1024**2)
        fix = t("Split it into several rows.")
    elif "unexpected end" in str(error):
        problem = t("a double quote is opened and never closed.")
        fix = t("Close it; a double quote inside a cell is written twice.")
    else:
        problem = t("this is not CSV: {reason}.", reason=str(error))
        fix = t("Put the cell in double quotes; a double quote inside it is written twice.")
    return RowError("broken-row", None, problem, f"{fix} {t('What follows it was not read.')}").at(
        place
    )


def _short(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
