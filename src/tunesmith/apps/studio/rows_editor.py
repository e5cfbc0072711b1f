"""The rows of a training file as a grid; what the grid cannot show is kept as it is."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic_ns
from typing import Any

import streamlit as st

from tunesmith.apps.studio.data_files import Stamp, free, named, require_free, stamp, writing
from tunesmith.data.file_rows import Cells, FileRow, file_rows, new_row, write_rows
from tunesmith.data.sources import is_lines
from tunesmith.language import t

PAGE_ROWS = 500  # shown and edited at once
ROW_HEIGHT = 66  # pixels: two lines of text, which wrap only in rows this high
SHOWN = 2000  # characters of a row that is only shown

Changes = Mapping[str, Any]
"""What was done in a grid, by place among its rows: edited_rows, added_rows, deleted_rows."""


@dataclass(frozen=True)
class Opened:
    """A file as it was when its grid was drawn; it may change on disk meanwhile.

    Streamlit drops what was changed in a grid once anything in it differs, a header or a note too.
    """

    file: Path
    stamp: Stamp | None
    rows: Sequence[FileRow]
    is_lines: bool
    problems: Mapping[int, str]
    serial: int

    def grid(self, page: int) -> str:
        """The key of the grid of one page."""
        return f"rows-{self.serial}-{page}"


def unsaved() -> Path | None:
    """The file with changes that are not saved."""
    opened: Opened | None = st.session_state.get("opened")
    if opened is None:
        return None
    changes = st.session_state.get(opened.grid(st.session_state.get("rows-page", 1)), {})
    return opened.file if any(changes.values()) else None


def forget() -> None:
    """Drop what was changed and not saved."""
    st.session_state.pop("opened", None)


def edit_file(file: Path, problems: Mapping[int, str]) -> None:
    """Draw the rows of a file; `problems` says what is wrong with which line."""
    opened = _opened(file, problems)
    page = _page(len(opened.rows))
    start = (page - 1) * PAGE_ROWS
    shown = opened.rows[start : start + PAGE_ROWS]
    rows = edited(shown, _grid(shown, opened.problems, opened.grid(page)))
    _kept([row for row in shown if row.cells is None])
    if unsaved() is None:
        return
    if opened.stamp != stamp(file):
        st.warning(t("{path} was changed or deleted elsewhere meanwhile.", path=file))
    name = _name(opened)
    left, right = st.columns(2)
    save = left.button(t("Save"), type="primary", icon=":material/save:", width="stretch")
    if right.button(t("Drop the changes"), icon=":material/undo:", width="stretch"):
        forget()
        st.rerun()
    if save:
        _save(opened, name, [*opened.rows[:start], *rows, *opened.rows[start + PAGE_ROWS :]])


def write_file() -> None:
    """Draw an empty grid for a new file."""
    serial = st.session_state.setdefault("new-rows", monotonic_ns())
    rows = edited([], _grid([], {}, f"rows-{serial}"))
    name = st.text_input(t("Save as"), free("rows").name, key="new-name")
    if st.button(t("Save"), type="primary", icon=":material/save:", disabled=not rows):
        path = named(name, ["jsonl"])
        require_free(path)
        _write(path, rows)
        del st.session_state["new-rows"]
        show_next(path, len(rows))


def edited(rows: Iterable[FileRow], changes: Changes) -> list[FileRow]:
    """The rows after what was done in their grid; those that the grid does not show stay."""
    kept, place = [], 0
    for row in rows:
        cells = row.cells
        if cells is None:
            kept.append(row)
            continue
        after = cells._replace(**_texts(changes["edited_rows"].get(place, {})))
        if place not in changes["deleted_rows"] and (after == cells or _has_text(after)):
            kept.append(row if after == cells else row.with_cells(after))
        place += 1
    added = (Cells(**_texts(one)) for one in changes["added_rows"])
    return [*kept, *(new_row(cells) for cells in added if _has_text(cells))]


def _opened(file: Path, problems: Mapping[int, str]) -> Opened:
    """The file; as it was when it was opened while there are changes that are not saved."""
    opened: Opened | None = st.session_state.get("opened")
    if opened is not None and unsaved() is not None:
        return opened
    now = stamp(file)
    if opened is None or (opened.file, opened.stamp, opened.problems) != (file, now, problems):
        rows = rows_of(file, now)
        opened = Opened(file, now, rows, is_lines(file), problems, monotonic_ns())
        st.session_state["opened"] = opened
        st.session_state.pop("rows-page", None)
    return opened


@st.cache_resource(max_entries=2, show_spinner=False)
def rows_of(file: Path, stamp: Stamp | None) -> Sequence[FileRow]:
    """The rows of a file, read once for each content it has."""
    return tuple(file_rows(file))


def _page(rows: int) -> int:
    if rows <= PAGE_ROWS:
        return 1
    if unsaved() is not None:
        st.caption(t("Save or drop the changes before you turn the page."))
    return st.pagination(-(-rows // PAGE_ROWS), key="rows-page", disabled=unsaved() is not None)


def _grid(rows: Sequence[FileRow], problems: Mapping[int, str], key: str) -> Changes:
    """Draw the rows that can be edited; returns what was done to them."""
    columns = ["line", *Cells._fields] if rows else [*Cells._fields]
    st.data_editor(
        _table(rows, problems),
        num_rows="dynamic",
        hide_index=True,
        row_height=ROW_HEIGHT,
        key=key,
        column_order=[*columns, "problem"] if problems else columns,
        column_config={
            "line": st.column_config.TextColumn("#", default="", disabled=True, width=50),
            "system": st.column_config.TextColumn(default="", width=110),
            "user": st.column_config.TextColumn(default="", width="medium"),
            "assistant": st.column_config.TextColumn(default="", width="medium"),
            "problem": st.column_config.TextColumn("⚠", default="", disabled=True, width="medium"),
        },
    )
    changes: Changes = st.session_state[key]
    return changes


def _table(rows: Sequence[FileRow], problems: Mapping[int, str]) -> Any:
    """A frame of objects, so that a column without rows is still no column of numbers."""
    import pandas

    table = [
        {
            "line": str(row.number),
            **row.cells._asdict(),
            "problem": problems.get(row.number or 0, ""),
        }
        for row in rows
        if row.cells is not None
    ]
    return pandas.DataFrame(table, columns=["line", *Cells._fields, "problem"], dtype=object)


def _kept(rows: Sequence[FileRow]) -> None:
    if not rows:
        return
    st.caption(
        t("Rows with more turns, with tools or with errors: {count}. They are only shown; saving "
          "keeps them as they are.", count=len(rows))
    )  # fmt: skip
    st.dataframe(
        [{"#": str(row.number), t("Row"): _text(row)} for row in rows],
        hide_index=True,
        row_height=ROW_HEIGHT,
        column_config={"#": st.column_config.TextColumn(width=50)},
    )


def _text(row: FileRow) -> str:
    if row.conversation is None:
        return row.line.decode(errors="replace")[:SHOWN]
    turns = (f"{one.role}: {one.content}" for one in row.conversation.messages)
    return "\n".join(turns)[:SHOWN]


def _name(opened: Opened) -> str:
    """What to save as: the file itself if it is JSONL, else a new one."""
    in_place = opened.is_lines and opened.file.suffix == ".jsonl"
    name = opened.file.name if in_place else free(opened.file.stem).name
    given = st.text_input(t("Save as"), name, key=f"name-{opened.serial}")
    if not in_place:
        st.caption(t("Rows are saved as JSONL; {path} stays as it is.", path=opened.file))
    return given


def _save(opened: Opened, name: str, rows: Sequence[FileRow]) -> None:
    path = named(name, ["jsonl"])
    if path != opened.file or opened.stamp != stamp(path) or not opened.is_lines:
        require_free(path)
    _write(path, rows)
    forget()
    show_next(path, len(rows))


def _write(path: Path, rows: Sequence[FileRow]) -> None:
    with writing(path):
        write_rows(path, rows)


def show_next(path: Path, rows: int) -> None:
    """Draw the page again with this file, which was just written, chosen."""
    st.session_state["written"] = (path, rows)
    st.rerun()


def _texts(cells: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(cells.get(name) or "") for name in Cells._fields if name in cells}


def _has_text(cells: Cells) -> bool:
    return any(text.strip() for text in cells)
