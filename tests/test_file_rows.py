"""A file's rows: what may be edited, what is kept as it stands, and what is written back."""

from pathlib import Path

import pytest

from tests.helpers_data import ROW, Save, conversations, jsonl, parquet, turns
from tunesmith.data import file_rows as module
from tunesmith.data.file_rows import Cells, file_rows, new_row, write_rows
from tunesmith.errors import UsageError

USER = {"role": "user", "content": "问"}
ANSWER = {"role": "assistant", "content": "答"}
SYSTEM = {"role": "system", "content": "短"}
CALL = ANSWER | {"tool_calls": [{"function": {"name": "now", "arguments": {}}}]}
TOOL = {"name": "now", "parameters": {}}

NOT_EDITABLE = [
    {"messages": [USER, ANSWER, USER, ANSWER]},
    {"messages": [ANSWER, USER]},
    {"messages": [USER, CALL]},
    {"messages": [USER, ANSWER], "tools": [TOOL]},
    {"messages": [USER | {"name": "Momo"}, ANSWER]},
    {"messages": [USER, ANSWER | {"weight": 0}]},
    {"instruction": "问", "output": "答", "history": [["早", "早"]]},
]


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        ({"messages": [USER, ANSWER]}, Cells("", "问", "答")),
        ({"messages": [SYSTEM, USER, ANSWER]}, Cells("短", "问", "答")),
        ({"messages": [USER]}, Cells("", "问", "")),
        ({"messages": []}, Cells()),
        ({"conversations": [{"from": "human", "value": "问"}]}, Cells("", "问", "")),
        (ROW, Cells("", "问", "答")),
        *((row, None) for row in NOT_EDITABLE),
    ],
)
def test_single_turns_can_be_edited(row: object, cells: Cells | None, save: Save) -> None:
    (one,) = file_rows(save("a.jsonl", jsonl(row)))
    assert one.cells == cells


def test_every_line_is_written_as_it_stood(save: Save) -> None:
    lines = [
        b'{"messages":[ {"role":"user","content":"\\u95ee"},{"content":"A","role":"assistant"} ]}',
        b'{"instruction": "Q", "output": "A", "id": 7}',
        b'{"messages": [',
        "问".encode("gb18030"),
        *(jsonl(row).strip().encode() for row in NOT_EDITABLE),
    ]
    file = save("a.jsonl", b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines))
    write_rows(file, file_rows(file))
    assert file.read_bytes() == b"".join(line + b"\n" for line in lines)


def test_a_changed_row_keeps_its_other_fields(save: Save) -> None:
    row = {
        "messages": [USER, ANSWER],
        "id": [1.5, None],
        "identity": {"name": "Momo", "author": "me"},
    }
    file = save("a.jsonl", jsonl(row))
    (one,) = file_rows(file)
    write_rows(file, [one.with_cells(Cells("短", "问", "新")), new_row(Cells("", "Q", "A"))])
    first, second = file_rows(file)
    assert (first.cells, second.cells) == (Cells("短", "问", "新"), Cells("", "Q", "A"))
    assert b'"id": [1.5, null]' in first.line
    assert first.conversation is not None and first.conversation.identity is not None


def test_rows_of_other_formats_become_lines(save: Save, tmp_path: Path) -> None:
    table = save("a.csv", "instruction,output\r\n问,答\r\nbroken\r\nQ,A\r\n")
    document = save("a.json", f'[{jsonl(ROW)}, {{"messages": 1}}]')
    columns = parquet(tmp_path / "a.parquet", [ROW | {"score": float("nan")}])
    rows = [row for file in (table, document, columns) for row in file_rows(file)]
    write_rows(tmp_path / "out.jsonl", rows)
    read = [turns(one) for one in conversations(tmp_path / "out.jsonl")]
    assert [read[0], *read[2:]] == [[("user", "问"), ("assistant", "答")]] * 3
    assert read[1] == [("user", "Q"), ("assistant", "A")]


def test_a_file_too_large_is_refused(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 10)
    with pytest.raises(UsageError, match="Split the file"):
        file_rows(save("a.jsonl", jsonl(ROW)))
