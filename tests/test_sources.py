"""Reading training files: every format, every place exact, no bytes that crash."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.helpers_data import ROW, Save, conversations, findings, jsonl, lines, parquet, turns
from tunesmith.data import json_document
from tunesmith.data.convert import as_row, write_messages
from tunesmith.data.findings import Finding
from tunesmith.data.json_document import document_rows
from tunesmith.data.json_rows import MAX_ROW_BYTES, Row
from tunesmith.data.messages import Conversation, Identity, Message
from tunesmith.data.sources import read
from tunesmith.errors import UsageError
from tunesmith.language import set_language


@pytest.fixture(autouse=True)
def english() -> None:
    set_language("en")


def test_one_row_in_every_format_is_the_same_conversation(save: Save, tmp_path: Path) -> None:
    files = [
        save("array.json", json.dumps([ROW], indent=2)),
        save("array.jsonl", json.dumps([ROW])),
        save("lines.jsonl", jsonl(ROW)),
        save("lines.json", jsonl(ROW)),
        save("object.json", json.dumps(ROW, indent=2)),
        save("table.csv", "instruction,input,output\n问,,答\n"),
        save("table.tsv", "instruction\tinput\toutput\n问\t\t答\n"),
        save("table.txt", "instruction;output\n问;答\n"),
        save("excel.jsonl", b"\xef\xbb\xbfinstruction,output\r\n\xe9\x97\xae,\xe7\xad\x94\r\n"),
        parquet(tmp_path / "table.parquet", [ROW]),
        parquet(tmp_path / "parquet.csv", [ROW]),
    ]
    found = conversations(*files)
    assert [row.messages for row in found] == [found[0].messages] * len(files)
    assert [row.place.file for row in found if row.place] == files


def test_chat_rows_in_tables(save: Save, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["messages", "tools"])
    writer.writerow([json.dumps(messages), ""])
    for file in (
        save("a.csv", text.getvalue()),
        parquet(tmp_path / "a.parquet", [{"messages": messages, "tools": None}]),
    ):
        [found] = conversations(file)
        assert turns(found) == [("user", "q"), ("assistant", "a")]


def test_rows_keep_their_lines(save: Save, tmp_path: Path) -> None:
    assert lines(save("a.json", json.dumps([ROW] * 3, indent=2))) == [2, 7, 12]
    assert lines(save("b.jsonl", jsonl(ROW) + "\n" + jsonl(ROW))) == [1, 3]
    assert lines(save("c.csv", 'instruction,output\n"a\nb",c\nd,e\n')) == [2, 4]
    assert lines(parquet(tmp_path / "d.parquet", [ROW] * 600))[-1] == 600


def test_byte_order_mark_and_crlf_are_named_and_harmless(save: Save) -> None:
    body = jsonl(ROW) + jsonl(ROW).replace("\n", "\r\n") * 2
    for name, text in (("a.jsonl", body), ("a.json", f"[\n{body.replace('}', '},')}]")):
        found = list(read([save(name, b"\xef\xbb\xbf" + text.encode())]))
        notes = [item for item in found if isinstance(item, Finding)]
        assert [note.kind for note in notes] == ["byte-order-mark", "crlf"]
        assert [note.place.line for note in notes] == [1, 2 if name == "a.jsonl" else 3]
        assert not any(note.is_error for note in notes)
        assert len(found) - len(notes) == 3


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_utf16_is_refused_once(save: Save, encoding: str) -> None:
    [finding] = findings(save("a.jsonl", (jsonl(ROW) * 3).encode(encoding)))
    assert finding.kind in {"encoding", "unsupported-file"}
    assert finding.is_error


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_gbk_is_named_with_its_line(save: Save, name: str) -> None:
    good = {"instruction": "q", "output": "a"}
    text = {
        "a.jsonl": jsonl(good, ROW),
        "a.json": f"[{json.dumps(good)},\n{json.dumps(ROW, ensure_ascii=False)}]",
        "a.csv": "instruction,output\n问,答\n",
    }[name]
    [finding] = findings(save(name, text.encode("gbk")))
    assert (finding.kind, finding.place.line) == ("encoding", 2)
    assert "GBK" in finding.problem
    assert "UTF-8" in finding.fix


def test_a_broken_line_does_not_hide_the_next(save: Save) -> None:
    file = save("a.jsonl", jsonl(ROW) + '{"instruction": "q", }\n' + jsonl(ROW))
    items = list(read([file]))
    assert [type(item) for item in items] == [Conversation, Finding, Conversation]
    [finding] = [item for item in items if isinstance(item, Finding)]
    assert str(finding).startswith(f"{file}:2: ")
    assert "column 22" in finding.problem
    assert finding.fix == "Delete the comma before it."


def test_a_broken_row_in_an_array_does_not_hide_the_next(save: Save) -> None:
    text = json.dumps([ROW] * 4, indent=2).splitlines()
    assert text[8] == '    "input": "",'
    text[8] = '    "input": ""'
    items = list(read([save("a.json", "\n".join(text))]))
    places = [(type(item), item.place.line) for item in items if item.place]
    assert places == [(Conversation, 2), (Finding, 10), (Conversation, 12), (Conversation, 17)]


def test_a_row_that_lost_its_end_costs_only_itself(save: Save) -> None:
    text = json.dumps([ROW] * 3, indent=2).splitlines()
    assert text[5] == "  },"
    del text[5]
    items = list(read([save("a.json", "\n".join(text))]))
    assert [type(item) for item in items] == [Finding, Conversation, Conversation]


def test_a_compact_array_stops_at_the_broken_row_and_says_so(save: Save) -> None:
    text = json.dumps([ROW] * 3).replace('"output"', "output", 1)
    [finding] = list(read([save("a.json", text)]))
    assert isinstance(finding, Finding)
    assert "not read" in finding.fix


def test_a_ten_megabyte_line_is_named_and_the_next_is_read(save: Save) -> None:
    large = {"instruction": "q", "output": "字" * (10 * 1024 * 1024 // 3)}
    for name, text in (
        ("a.jsonl", jsonl(large, ROW)),
        ("a.json", json.dumps([large, ROW], ensure_ascii=True)),
    ):
        items = list(read([save(name, text)]))
        assert [type(item) for item in items] == [Finding, Conversation]
        assert isinstance(items[0], Finding)
        assert items[0].kind == "too-large"
    almost = {"instruction": "q", "output": "x" * (MAX_ROW_BYTES - 100)}
    assert len(conversations(save("b.jsonl", jsonl(almost)))) == 1


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.jsonl", b"", "empty-file"),
        ("a.json", b"[]", "empty-file"),
        ("a.csv", b"instruction,output\n", "empty-file"),
        ("a.jsonl", b"\n \n", "empty-file"),
        ("a.json", b'[{"instruction": "q", "output": "a"}', "broken-row"),
        ("a.json", b'[{"instruction": "q", "output": "a"}] 1', "broken-row"),
        ("a.xlsx", b"PK\x03\x04\x00\x00", "unsupported-file"),
        ("a.md", b"# A title\n", "unsupported-file"),
        ("a.parquet", b"PAR1 is not enough", "broken-row"),
        ("a.csv", b"instruction,output\na,b,c\n", "broken-row"),
        ("a.csv", b'instruction,output\n"a,b\n', "broken-row"),
        ("a.csv", b'instruction,output\n"a"b,c\n', "broken-row"),
    ],
)
def test_a_bad_file_is_a_finding(save: Save, name: str, content: bytes, kind: str) -> None:
    assert [item.kind for item in findings(save(name, content))] == [kind]


def test_a_cut_parquet_file_is_a_finding(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", [ROW] * 50)
    file.write_bytes(file.read_bytes()[:-40])
    assert [item.kind for item in findings(file)] == ["broken-row"]


def test_missing_files_and_folders_are_refused_before_reading(save: Save, tmp_path: Path) -> None:
    good = save("a.jsonl", jsonl(ROW))
    with pytest.raises(UsageError, match="does not exist"):
        read([good, tmp_path / "none.jsonl"])
    with pytest.raises(UsageError, match="folder"):
        read([tmp_path])


def test_lines_stay_exact_deep_in_a_large_file(save: Save) -> None:
    large = [{"instruction": f"q{number}", "output": "x" * 1000} for number in range(5000)]
    text = json.dumps(large, indent=2).splitlines()
    broken = (1500, 3000, 4999)
    for number in broken:
        text[4 * number + 3] = '    "output": x'
    items = list(read([save("a.json", "\n".join(text))]))
    assert [item.place.line for item in items if item.place] == [
        4 * number + (4 if number in broken else 2) for number in range(5000)
    ]
    assert sum(isinstance(item, Finding) for item in items) == len(broken)


broken_pieces = st.lists(
    st.tuples(
        st.integers(0, 10_000), st.sampled_from(["", "\n", "}", "{", "]", '"', ",", "\\", "x"])
    ),
    max_size=3,
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(st.sampled_from(["compact", "indented", "lines", "objects"]), broken_pieces)
def test_a_document_read_through_a_small_window_is_the_same(
    tmp_path: Path, layout: str, broken: list[tuple[int, str]]
) -> None:
    some = [ROW | {"note": [number, "é" * number, {"x": None}]} for number in range(12)]
    text = {
        "compact": json.dumps(some),
        "indented": json.dumps(some, indent=2, ensure_ascii=False),
        "lines": "[\r\n" + ",\r\n".join(json.dumps(row) for row in some) + "\r\n]",
        "objects": "\n".join(json.dumps(row, indent=1) for row in some),
    }[layout]
    for at, piece in broken:
        text = text[: at % len(text)] + piece + text[at % len(text) + 1 :]
    file = tmp_path / "a.json"
    file.write_bytes(text.encode())
    whole = _without_crlf(document_rows(file))
    for size in (1, 50):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_document, "_PIECE", size)
            patch.setattr(json_document, "_FORGET_AFTER", 150)
            assert _without_crlf(document_rows(file)) == whole


def _without_crlf(items: Iterable[Row | Finding]) -> list[Row | Finding]:
    """The note comes before the rows of the piece it is found in."""
    return [item for item in items if not (isinstance(item, Finding) and item.kind == "crlf")]


def test_bytes_that_are_not_utf8_are_named_behind_the_rows_before_them(save: Save) -> None:
    good = json.dumps([ROW | {"note": "x" * 1000}] * 3000, indent=0)[:-2].encode()
    items = list(read([save("a.json", good + b',\n{"instruction": "\xff"}]')]))
    *_, last = items
    assert isinstance(last, Finding) and last.kind == "encoding"
    assert last.place.line == good.count(b"\n") + 2
    assert sum(isinstance(item, Conversation) for item in items) > 2000


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
arguments = st.dictionaries(texts, st.one_of(st.integers(), texts, st.lists(st.booleans())))
calls = st.builds(
    lambda name, values: {"type": "function", "function": {"name": name, "arguments": values}},
    texts.filter(bool),
    arguments,
)
plain_turns = st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), texts)
call_turns = st.builds(
    lambda text, made: Message("assistant", text, tool_calls=tuple(made)),
    texts,
    st.lists(calls, min_size=1, max_size=2),
)
rows = st.builds(
    Conversation,
    messages=st.lists(st.one_of(plain_turns, call_turns), max_size=4).map(tuple),
    tools=st.lists(
        st.builds(
            lambda name: {"type": "function", "function": {"name": name}}, texts.filter(bool)
        ),
        max_size=2,
    ).map(tuple),
    identity=st.one_of(st.none(), st.builds(Identity, texts, texts)),
)
quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@quick
@given(st.lists(rows, min_size=1, max_size=4))
def test_what_is_written_is_read_back(tmp_path: Path, written: list[Conversation]) -> None:
    file = tmp_path / "rows.jsonl"
    write_messages(file, written, overwrite=True)
    found = conversations(file)
    assert [as_row(row) for row in found] == [as_row(row) for row in written]
    assert [(row.messages, row.tools, row.identity) for row in found] == [
        (row.messages, row.tools, row.identity) for row in written
    ]


json_like = st.text(st.sampled_from('[]{}:," \n\t\\abu0d8instructionoutput'), max_size=60)
openings = st.sampled_from(
    [
        b"",
        b"[",
        b'{"instruction": "',
        b"instruction,output\n",
        b"PAR1",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
    ]
)


@settings(quick, max_examples=300)
@given(openings, st.one_of(st.binary(max_size=80), json_like.map(str.encode)), st.booleans())
@example(b"[", b'\n{"a": 1\n{"a": 1', True)
@example(b"", b"[" * 5000, True)
@example(b"instruction,output\n", b"\r,\r", False)
def test_no_bytes_crash_the_reader(
    tmp_path: Path, opening: bytes, rest: bytes, is_json: bool
) -> None:
    file = tmp_path / ("a.json" if is_json else "a.csv")
    file.write_bytes(opening + rest)
    items = list(read([file]))
    assert items
    for item in items:
        assert item.place is not None
        assert 1 <= item.place.line <= (opening + rest).count(b"\n") + 2


row_names = ["messages", "conversations", "instruction", "output", "history", "system", "tools"]
turn_names = ["role", "from", "content", "value", "tool_calls", "function", "name", "arguments"]
names = st.sampled_from([*row_names, *turn_names, "identity"])
any_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=4)),
    max_leaves=12,
)


@settings(quick, max_examples=200)
@given(st.dictionaries(names, any_json, max_size=5))
def test_no_json_crashes_the_reader(tmp_path: Path, row: dict[str, Any]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert list(read([file]))
