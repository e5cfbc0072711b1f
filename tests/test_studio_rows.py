"""The grid of rows: edits, saving, what it cannot show, and files that change meanwhile."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from tests.helpers_data import conversations, jsonl, turns
from tests.helpers_page import visit
from tunesmith.apps.studio import rows_editor
from tunesmith.apps.studio.rows_editor import Changes, edited
from tunesmith.data import file_rows as module
from tunesmith.data.file_rows import Cells, FileRow, file_rows, new_row

HI = {"instruction": "Hi", "output": "Hello!", "id": 1}
LONG = {"messages": [{"role": role, "content": "x"} for role in ["user", "assistant"] * 2]}
BYE = {"instruction": "Bye", "output": "See you!"}
BROKEN = '{"messages": ['


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    return tmp_path


def changes(**given: Any) -> Changes:
    return {"edited_rows": {}, "added_rows": [], "deleted_rows": []} | given


def change(page: AppTest, **given: Any) -> AppTest:
    """Do in the grid of the chosen file what a visitor's hands would."""
    opened = page.session_state["opened"]
    page.session_state[opened.grid(1)] = changes(**given)
    page.run()
    assert not page.exception
    return page


def press(page: AppTest, label: str, place: int = -1) -> AppTest:
    [button for button in page.button if button.label == label][place].click().run()
    assert not page.exception
    return page


def name_file(page: AppTest, name: str) -> None:
    [field for field in page.text_input if field.label in ("Save as", "保存为")][-1].set_value(name)


ROWS = [new_row(Cells("", "Hi", "Hello!")), FileRow(BROKEN.encode(), 2), new_row(Cells("s", "u"))]


@pytest.mark.parametrize(
    ("done", "left"),
    [
        (changes(), ROWS),
        (changes(edited_rows={0: {"assistant": "Hello!"}}), ROWS),
        (
            changes(edited_rows={1: {"assistant": "a", "system": None}}),
            [*ROWS[:2], new_row(Cells("", "u", "a"))],
        ),
        (changes(deleted_rows=[0]), ROWS[1:]),
        (changes(edited_rows={0: {"user": "", "assistant": " "}}), ROWS[1:]),
        (
            changes(added_rows=[{"user": "new", "line": None}, {}, {"system": "  "}]),
            [*ROWS, new_row(Cells("", "new"))],
        ),
        (changes(deleted_rows=[0, 1], added_rows=[]), [ROWS[1]]),
    ],
)
def test_edits_reach_the_rows_they_mean(done: Changes, left: list[FileRow]) -> None:
    assert edited(ROWS, done) == left


def test_nothing_is_lost_on_saving(folder: Path) -> None:
    file = folder / "data/a.jsonl"
    file.write_text(f"{jsonl(HI, LONG)}{BROKEN}\n{jsonl(BYE)}")
    page = visit("data")
    grid, kept = page.data_editor[-1].value, page.dataframe[-1].value
    assert grid["user"].tolist() == ["Hi", "Bye"]
    assert grid["line"].tolist() == ["1", "4"]
    assert kept["#"].tolist() == ["2", "3"]
    change(page, edited_rows={1: {"assistant": "Bye!"}}, added_rows=[{"user": "Q"}])
    assert page.selectbox[0].disabled
    press(page, "Save")
    lines = file.read_text().splitlines()
    assert lines[:3] == [*jsonl(HI, LONG).splitlines(), BROKEN]
    assert [row.cells for row in file_rows(file)][3:] == [
        Cells("", "Bye", "Bye!"),
        Cells("", "Q", ""),
    ]
    assert "data/a.jsonl" in page.toast[0].value


def test_changes_can_be_dropped(folder: Path) -> None:
    file = folder / "data/a.jsonl"
    file.write_text(jsonl(HI))
    page = change(visit("data"), deleted_rows=[0])
    press(page, "Drop the changes")
    assert file.read_text() == jsonl(HI)
    assert "Save" not in [button.label for button in page.button if not button.disabled]


def test_another_format_is_saved_beside_it(folder: Path) -> None:
    file = folder / "data/a.csv"
    file.write_text("instruction,output\nHi,Hello!\nbroken\n")
    (folder / "data/a.jsonl").write_text(jsonl(BYE))
    page = visit("data")
    page.selectbox[0].set_value("data/a.csv").run()
    change(page, edited_rows={0: {"assistant": "Hey!"}})
    assert "Rows are saved as JSONL; data/a.csv stays as it is." in [c.value for c in page.caption]
    name_file(page, "a.jsonl")
    press(page, "Save")
    assert "data/a.jsonl exists already" in page.error[0].value
    name_file(page, "a-2.jsonl")
    press(page, "Save")
    assert turns(*conversations(folder / "data/a-2.jsonl")) == [
        ("user", "Hi"),
        ("assistant", "Hey!"),
    ]
    assert "broken" in file.read_text()
    assert (folder / "data/a.jsonl").read_text() == jsonl(BYE)


@pytest.mark.parametrize("deleted", [False, True])
def test_a_file_that_changes_meanwhile_costs_no_edit(folder: Path, deleted: bool) -> None:
    file = folder / "data/a.jsonl"
    file.write_text(jsonl(HI))
    page = change(visit("data"), edited_rows={0: {"assistant": "mine"}})
    file.unlink() if deleted else file.write_text(jsonl(HI, BYE))
    page.run()
    assert "data/a.jsonl was changed or deleted elsewhere meanwhile." in [
        warning.value for warning in page.warning
    ]
    if not deleted:
        press(page, "Save")
        assert "data/a.jsonl exists already" in page.error[0].value
        assert file.read_text() == jsonl(HI, BYE)
        name_file(page, "mine.jsonl")
    press(page, "Save")
    saved = folder / ("data/a.jsonl" if deleted else "data/mine.jsonl")
    assert [row.cells for row in file_rows(saved)] == [Cells("", "Hi", "mine")]


def test_a_file_that_is_gone_is_said(folder: Path) -> None:
    for name in "ab":
        (folder / f"data/{name}.jsonl").write_text(jsonl(HI))
    page = visit("data")
    page.selectbox[0].set_value("data/b.jsonl").run()
    (folder / "data/b.jsonl").unlink()
    page.run()
    assert not page.exception
    assert page.info[0].value == "data/b.jsonl is no longer here."
    assert page.selectbox[0].value == "data/a.jsonl"


def test_a_file_too_large_to_edit_is_checked_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 10)
    (folder / "data/a.jsonl").write_text(jsonl(HI))
    page = visit("data")
    assert page.success[0].value == "1 of 1 rows can be trained on."
    (error,) = page.error
    assert "Split the file" in error.value


def test_many_rows_are_edited_page_by_page(folder: Path) -> None:
    file = folder / "data/a.jsonl"
    rows = [{"instruction": f"Q{number}", "output": "A"} for number in range(1, 1102)]
    file.write_text(jsonl(*rows))
    page = visit("data")
    assert len(page.data_editor[-1].value) == rows_editor.PAGE_ROWS
    page.session_state["rows-page"] = 3
    page.run()
    assert page.data_editor[-1].value["user"].tolist() == [f"Q{n}" for n in range(1001, 1102)]
    opened = page.session_state["opened"]
    page.session_state[opened.grid(3)] = changes(deleted_rows=[0], added_rows=[{"user": "new"}])
    page.run()
    press(page, "Save")
    lines = file.read_text().splitlines()
    assert lines[:1000] + lines[1000:-1] == jsonl(*rows[:1000], *rows[1001:]).splitlines()
    assert file_rows(file)[-1].cells == Cells("", "new")


@pytest.mark.parametrize(("language", "save"), [("en", "Save"), ("zh", "保存")])
def test_a_file_is_written_from_nothing(folder: Path, language: str, save: str) -> None:
    page = visit("data", language)
    key = f"rows-{page.session_state['new-rows']}"
    page.session_state[key] = changes(added_rows=[{"user": "你好", "assistant": "嗨"}])
    page.run()
    press(page, save)
    assert turns(*conversations(folder / "data/rows.jsonl")) == [
        ("user", "你好"),
        ("assistant", "嗨"),
    ]
    assert page.selectbox[0].value == "data/rows.jsonl"


@pytest.fixture
def full_disk(folder: Path) -> Iterator[Path]:
    """The data folder on a disk of 64 kB."""
    place = folder / "data"
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small tmpfs is not permitted here (it needs root)")
    yield place
    subprocess.run(["umount", str(place)], check=False, capture_output=True)


def test_a_full_disk_costs_nothing(full_disk: Path) -> None:
    file = full_disk / "a.jsonl"
    file.write_text(jsonl(HI, HI))
    before = file.read_bytes()
    page = change(visit("data"), edited_rows={0: {"assistant": "x" * 100_000}})
    press(page, "Save")
    assert page.error[0].value == "data/a.jsonl cannot be written: No space left on device."
    assert file.read_bytes() == before
    (full_disk / "filler").write_bytes(bytes(64 * 1024 - 4096))
    press(page, "Drop the changes")
    press(page, "Fix what is certain (1)")
    assert page.error[0].value == "data/a-fixed.jsonl cannot be written: No space left on device."
    page.text_input[2].set_value("me.jsonl")
    press(page, "Write it down")
    assert page.error[0].value == "data/me.jsonl cannot be written: No space left on device."
    assert sorted(one.name for one in full_disk.iterdir()) == ["a.jsonl", "filler"]
