"""Any accepted form becomes one clean messages file; a split shares no question."""

import json
from pathlib import Path

import pytest

from tests.helpers_data import load
from tunesmith.data.checks import check, question_key
from tunesmith.data.convert import convert, split, write_messages
from tunesmith.data.messages import Conversation, Message
from tunesmith.errors import DataError, UsageError

EXAMPLES = sorted((Path(__file__).parent.parent / "examples" / "data").iterdir())


def rows(count: int) -> list[Conversation]:
    return [
        Conversation((Message("user", f"q{number}"), Message("assistant", f"a{number}")))
        for number in range(count)
    ]


def content(path: Path) -> list[tuple[object, ...]]:
    return [(row.messages, row.tools, row.identity) for row in load([path])]


def test_every_example_is_clean_and_converts_to_itself(tmp_path: Path) -> None:
    assert check(EXAMPLES).findings == ()
    made = convert(EXAMPLES, tmp_path / "clean.jsonl")
    assert made.left_out == ()
    expected = [(row.messages, row.tools, row.identity) for row in load(EXAMPLES)]
    assert content(made.path) == expected
    again = convert([made.path], tmp_path / "again.jsonl")
    assert again.path.read_bytes() == made.path.read_bytes()


def test_bad_rows_and_copies_are_left_out_and_reported(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = [{"instruction": "q", "output": answer} for answer in ("a", "", "a", "b")]
    source.write_text("\n".join(map(json.dumps, lines)) + "\n{", encoding="utf-8")
    before = source.read_bytes()
    made = convert([source], tmp_path / "out.jsonl")
    assert [(item.place.line, item.kind) for item in made.left_out] == [
        (2, "empty"),
        (3, "duplicate"),
        (5, "broken-row"),
    ]
    assert made.rows == len(content(made.path)) == 2
    assert source.read_bytes() == before


def test_holdout_writes_a_second_file_that_shares_no_question(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    write_messages(source, rows(40))
    made = convert([source], tmp_path / "train.jsonl", holdout=0.1)
    assert made.held_out_path == tmp_path / "train.held-out.jsonl"
    assert (made.rows, made.held_out) == (36, 4)
    assert check([made.path], [made.held_out_path]).findings == ()


@pytest.mark.parametrize("seed", range(5))
def test_split_keeps_rows_that_ask_the_same_together(seed: int) -> None:
    asked = [row for row in rows(10) for _ in range(3)]
    kept, held_out = split(asked, 0.3, seed=seed)
    assert len(held_out) == 9
    assert len(kept) + len(held_out) == 30
    assert not {question_key(row) for row in kept} & {question_key(row) for row in held_out}
    assert split(asked, 0.3, seed=seed) == (kept, held_out)
    assert [row for row in asked if row in kept] == kept


def test_split_leaves_something_on_both_sides() -> None:
    assert [len(part) for part in split(rows(10), 0.0)] == [10, 0]
    assert [len(part) for part in split(rows(2), 0.01)] == [1, 1]
    assert [len(part) for part in split(rows(1), 0.5)] == [1, 0]
    assert [len(part) for part in split(rows(1) * 9, 0.5)] == [9, 0]
    assert split([], 0.5) == ([], [])


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_messages(path, rows(3))
    before = path.read_bytes()
    with pytest.raises(UsageError):
        write_messages(path, rows(1))
    with pytest.raises(UsageError):
        convert([path], path, overwrite=True)
    with pytest.raises(UsageError):
        write_messages(tmp_path, rows(1), overwrite=True)
    assert path.read_bytes() == before
    write_messages(path, rows(1), overwrite=True)
    assert len(content(path)) == 1


def test_a_taken_held_out_name_stops_before_anything_is_written(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    write_messages(source, rows(10))
    (tmp_path / "out.held-out.jsonl").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match=r"held-out"):
        convert([source], tmp_path / "out.jsonl", holdout=0.2)
    assert not (tmp_path / "out.jsonl").exists()


def test_no_good_row_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"instruction": "q", "output": ""}\n', encoding="utf-8")
    with pytest.raises(DataError):
        convert([source], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
