"""What is put right without asking, and that nothing else is touched."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers_data import Save, jsonl
from tunesmith.data.checks import check
from tunesmith.data.file_rows import FileRow, file_rows, write_rows
from tunesmith.data.fixes import fix
from tunesmith.data.messages import Conversation, Message


def said(*turns: str) -> dict[str, Any]:
    """A row of turns, written as "user: Hi"."""
    pairs = (turn.split(": ", 1) for turn in turns)
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


def fixed(save: Save, *rows: object) -> tuple[str, int]:
    file = save("a.jsonl", jsonl(*rows))
    done = fix(file_rows(file), check([file]).findings)
    return "".join(row.line.decode() + "\n" for row in done.rows), done.count


GOOD = said("user: Hi", "assistant: Hello!")
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}],
}


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        (said("user: Q", "assistant: a\r\nb\rc\fd"), said("user: Q", "assistant: a\nb\nc\nd")),
        (said("user: \x1b[31mQ\x1b[0m\x00", "assistant: A\x07"), said("user: Q", "assistant: A")),
        (said("user: Q", "assistant: A", "user: And?"), said("user: Q", "assistant: A")),
        (said("system: ", "user: Q", "assistant: A"), said("user: Q", "assistant: A")),
        (said("user: ", "assistant:  "), None),
        (said("user: \x00", "assistant: \x1b[0m"), None),
        ({"messages": []}, None),
        (GOOD, None),
        (said("user: \x07Hi", "assistant: Hello!"), None),
    ],
)
def test_what_is_certain_is_put_right(bad: Any, good: Any, save: Save) -> None:
    assert fixed(save, GOOD, bad) == (jsonl(GOOD, *([good] if good else [])), 1)


@pytest.mark.parametrize(
    "row",
    [
        said("user: Q"),
        said("user: Q", "assistant: "),
        said("user: ", "assistant: A"),
        said("user: Hi", "assistant: Another answer."),
        said("user: Q", "assistant: I am {{name}}."),
        said("user: Q", "assistant: <|im_end|>"),
        said("user: Q", "user: Q", "assistant: A"),
        said("assistant: A"),
        {"messages": [{"role": "user", "content": "What time is it?"}, CALL]},
        {"instruction": "Q", "output": "A", "note": "kept"},
        {"messages": "nothing that can be read"},
    ],
)
def test_what_is_not_certain_is_left(row: object, save: Save) -> None:
    assert fixed(save, GOOD, row) == (jsonl(GOOD, row), 0)


def test_marks_of_the_file_count(save: Save) -> None:
    file = save("a.jsonl", b"\xef\xbb\xbf" + jsonl(GOOD).encode().replace(b"\n", b"\r\n"))
    done = fix(file_rows(file), check([file]).findings)
    assert done.count == 2
    write_rows(file, done.rows)
    assert check([file]).findings == ()
    assert fix(file_rows(file), check([file]).findings).count == 0


TEXT = st.text(st.sampled_from("a \n\r\x00\x1b[31m\f你"), max_size=6)
MESSAGE = st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), TEXT)
ROW = st.lists(MESSAGE, max_size=4).map(
    lambda messages: FileRow(b"").with_conversation(Conversation(tuple(messages)))
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(ROW, max_size=6))
def test_fixing_twice_changes_nothing_more(rows: list[FileRow]) -> None:
    once = fix(rows)
    again = fix(once.rows)
    assert again.count == 0
    assert all(one is other for one, other in zip(once.rows, again.rows, strict=True))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(rows=st.lists(ROW, max_size=6))
def test_no_finding_that_is_certain_is_left(
    rows: list[FileRow], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = Path(tmp_path_factory.mktemp("fixed")) / "a.jsonl"
    write_rows(file, fix(rows).rows)
    left = {found.kind for found in check([file]).findings}
    assert not left & {"duplicate", "control-character", "byte-order-mark", "crlf"}
