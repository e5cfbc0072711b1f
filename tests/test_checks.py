"""Every kind of bad row is named by file, line, field and fix, and none is trained on."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest

from tests.helpers_data import load
from tunesmith.data.checks import Checker, check
from tunesmith.data.findings import Finding
from tunesmith.data.messages import Conversation, Message
from tunesmith.errors import DataError, UsageError
from tunesmith.language import set_language

Turn = tuple[str, str]
Save = Callable[..., Path]


@pytest.fixture(autouse=True)
def english() -> None:
    set_language("en")


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(*rows: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


def alpaca(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"instruction": question, "output": answer, **more}


def chat(*turns: Turn) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def one(path: Path) -> Finding:
    [finding] = check([path]).findings
    return finding


def test_good_rows_have_no_findings(save: Save) -> None:
    call = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    tool_use = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": call},
            {"role": "tool", "content": ""},
            {"role": "assistant", "content": "a"},
        ]
    }
    ends_with_call = {"messages": tool_use["messages"][1:3]}
    path = save(alpaca("问", "答"), tool_use, ends_with_call)
    report = check([path])
    assert (report.rows, report.usable, report.findings) == (3, 3, ())
    assert [row.place.line for row in load([path]) if row.place] == [1, 2, 3]


@pytest.mark.parametrize("answer", ["", " \n\t", "\u3000"])
def test_an_empty_answer_is_named_by_its_own_field(save: Save, answer: str) -> None:
    path = save(alpaca("q", "a"), alpaca("p", answer))
    finding = one(path)
    assert (finding.kind, finding.field, finding.is_error) == ("empty", "output", True)
    assert str(finding) == f"{path}:2 output: the answer is empty. Write it, or delete the row."


@pytest.mark.parametrize(
    ("row", "field", "severity"),
    [
        (alpaca("", "a"), "instruction", "error"),
        (alpaca("q", "a", history=[["p", ""]]), "history[0][1]", "error"),
        (chat(("user", ""), ("assistant", "a")), "messages[0].content", "error"),
        (chat(("system", ""), ("user", "q"), ("assistant", "a")), "messages[0].content", "warning"),
    ],
)
def test_empty_turns(save: Save, row: Any, field: str, severity: str) -> None:
    finding = one(save(row))
    assert (finding.kind, finding.field, finding.severity) == ("empty", field, severity)


@pytest.mark.parametrize(
    ("roles", "kind", "index"),
    [
        ("assistant", "role-order", 0),
        ("assistant user", "role-order", 0),
        ("user user assistant", "role-order", 1),
        ("user assistant assistant", "role-order", 2),
        ("user assistant user", "role-order", 2),
        ("user system assistant", "role-order", 1),
        ("system system user assistant", "role-order", 1),
        ("system assistant", "role-order", 1),
        ("tool assistant", "role-order", 0),
        ("user tool assistant", "role-order", 1),
        ("user assistant tool assistant", "role-order", 2),
        ("user", "no-answer", None),
        ("system user", "no-answer", None),
        ("", "no-answer", None),
    ],
)
def test_wrong_role_order(save: Save, roles: str, kind: str, index: int | None) -> None:
    finding = one(save(chat(*((role, "x") for role in roles.split()))))
    field = None if index is None else f"messages[{index}].content"
    assert (finding.kind, finding.field, finding.is_error) == (kind, field, True)
    assert finding.fix


def test_a_call_that_no_tool_answers(save: Save) -> None:
    call = json.dumps({"name": "f", "arguments": {}})
    said = [("human", "q"), ("function_call", call), ("human", "p"), ("gpt", "a")]
    finding = one(save({"conversations": [{"from": who, "value": what} for who, what in said]}))
    assert (finding.kind, finding.field) == ("role-order", "conversations[2].value")
    assert "tool" in finding.problem


@pytest.mark.parametrize(
    ("text", "severity"),
    [
        ("I am {{name}}.", "error"),
        ("By {{ AUTHOR }}.", "error"),
        ("Dear {{customer_name}},", "warning"),
        ("Write `{{name}}` in the template.", None),
        ("```jinja\nHello {{ name }}\n```", None),
        ("A set {{1, 2}} or {name}", None),
    ],
)
def test_unfilled_placeholders(save: Save, text: str, severity: str | None) -> None:
    found = check([save(alpaca("q", text))]).findings
    assert [(item.kind, item.severity, item.field) for item in found] == (
        [("placeholder", severity, "output")] if severity else []
    )


def test_duplicates_and_contradictions_name_the_first(save: Save) -> None:
    path = save(
        alpaca("q", "a"),
        alpaca("p", "a"),
        chat(("user", "q"), ("assistant", "a")),
        alpaca("p", "b"),
        alpaca("q", "a", system="s"),
    )
    copied, other = check([path]).findings
    assert (copied.kind, copied.place.line, copied.severity) == ("duplicate", 3, "warning")
    assert f"{path}:1" in copied.problem
    assert (other.kind, other.place.line, other.severity) == ("contradiction", 4, "warning")
    assert f"{path}:2" in other.problem
    assert len(load([path])) == 5


def test_duplicates_are_seen_across_files(save: Save) -> None:
    first, second = save(alpaca("q", "a"), name="1.jsonl"), save(alpaca("q", "a"), name="2.jsonl")
    [finding] = check([first, second]).findings
    assert finding.place.file == second
    assert str(first) in finding.problem


def test_evaluation_rows_in_training_are_named(save: Save) -> None:
    train = save(alpaca("Who?", "me"), alpaca("Why?", "because", system="s"), name="train.jsonl")
    held_out = save(alpaca("How?", "so"), alpaca(" why? ", "other"), name="eval.jsonl")
    [finding] = check([train], [held_out]).findings
    assert (finding.kind, finding.place.line, finding.is_error) == ("leak", 2, True)
    assert f"{held_out}:2" in finding.problem
    with pytest.raises(DataError, match=r"held-out row .*eval.jsonl:2"):
        load([train], [held_out])
    assert check([train]).findings == ()


def test_bad_held_out_rows_are_named_too(save: Save) -> None:
    train, held_out = save(alpaca("q", "a")), save(alpaca("p", ""), name="eval.jsonl")
    report = check([train], [held_out])
    assert [(item.kind, item.place.file) for item in report.findings] == [("empty", held_out)]
    assert (report.rows, report.usable) == (2, 1)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Hi<|im_end|>", "control-token"),
        ("[INST] hi", "control-token"),
        ("end</s>", "control-token"),
        ("\x1b[31mred", "control-character"),
        ("a\r\nb", "control-character"),
        ("a\x00b", "control-character"),
    ],
)
def test_control_text_is_a_warning(save: Save, text: str, kind: str) -> None:
    finding = one(save(alpaca("q", text)))
    assert (finding.kind, finding.field, finding.severity) == (kind, "output", "warning")


@pytest.mark.parametrize("text", ["a < b and c > d", "x |> f <| y", "tab\there\nline", "[INSTALL]"])
def test_ordinary_text_is_not_control_text(save: Save, text: str) -> None:
    assert check([save(alpaca("q", text))]).findings == ()


def test_load_refuses_and_says_what_to_type(save: Save) -> None:
    path = save(*(alpaca(f"q{number}", "") for number in range(5)), name="my rows.jsonl")
    with pytest.raises(DataError) as caught:
        load([path])
    message = str(caught.value)
    assert "cannot be trained on: 5." in message
    assert message.count("the answer is empty") == 3
    assert f"tunesmith data check '{path}'" in message


def test_load_refuses_a_file_that_cannot_be_read(save: Save, tmp_path: Path) -> None:
    path = save(alpaca("q", "a"))
    path.write_text(path.read_text(encoding="utf-8") + "\n{broken", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.jsonl:2"):
        load([path])
    with pytest.raises(UsageError):
        load([tmp_path / "none.jsonl"])


def test_the_report_counts_broken_rows(save: Save) -> None:
    path = save(alpaca("q", "a"), {"text": "x"}, alpaca("p", ""), 3)
    report = check([path])
    assert (report.rows, report.usable) == (4, 1)
    assert len(report.errors) == 3
    assert report.warnings == ()


def test_findings_speak_chinese(save: Save) -> None:
    path = save(alpaca("问", ""))

    def chinese() -> str:
        set_language("zh")
        return str(one(path))

    text = copy_context().run(chinese)
    assert text.endswith("output: 回答是空的。 请写上回答，或者删掉这一行。")


def test_a_checker_takes_conversations_from_anywhere() -> None:
    checker = Checker()
    row = Conversation((Message("user", "q"), Message("assistant", "")))
    [finding] = checker.examine(row)
    assert finding.field == "messages[1].content"


def test_checking_imports_neither_torch_nor_pyarrow(save: Save) -> None:
    program = (
        "import sys; from pathlib import Path; from tunesmith.data.checks import check; "
        f"assert check([Path({str(save(alpaca('q', 'a')))!r})]).usable == 1; "
        "assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
