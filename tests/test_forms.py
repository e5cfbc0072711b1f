"""Rows of every accepted form become the same conversations; others are named with a fix."""

import json
from pathlib import Path

import pytest

from tests.helpers_data import Save, conversations, findings, jsonl, turns
from tunesmith.data.findings import Finding
from tunesmith.data.messages import Identity, Message
from tunesmith.data.sources import read
from tunesmith.language import set_language

EXAMPLES = Path(__file__).parent.parent / "examples" / "data"


@pytest.fixture(autouse=True)
def english() -> None:
    set_language("en")


def test_alpaca_with_system_and_history(save: Save) -> None:
    row = {
        "system": "Be brief.",
        "instruction": "Translate.",
        "input": "山",
        "output": "Mountain.",
        "history": [["Hi", "Hello!"]],
    }
    [found] = conversations(save("a.json", json.dumps([row])))
    assert turns(found) == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello!"),
        ("user", "Translate.\n山"),
        ("assistant", "Mountain."),
    ]


@pytest.mark.parametrize(
    "names", [("instruction", "output"), ("prompt", "completion"), ("query", "response")]
)
def test_question_and_answer_go_by_their_usual_names(save: Save, names: tuple[str, str]) -> None:
    [found] = conversations(save("a.jsonl", jsonl(dict(zip(names, ("Q", "A"), strict=True)))))
    assert turns(found) == [("user", "Q"), ("assistant", "A")]


def test_sharegpt_calls_and_observations_become_tool_turns() -> None:
    first, second = conversations(EXAMPLES / "sharegpt.jsonl")
    assert [message.role for message in first.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    call = first.messages[2].tool_calls[0]
    arguments = {"title": "The Hobbit"}
    assert call == {"type": "function", "function": {"name": "find_book", "arguments": arguments}}
    assert first.messages[2].content == ""
    assert first.tools[0]["type"] == "function"
    assert first.tools[0]["function"]["name"] == "find_book"
    assert second.tools == ()


def test_calls_after_text_and_several_calls_are_one_turn(save: Save) -> None:
    call = json.dumps({"name": "f", "arguments": "{}"})
    said = [("human", "q"), ("gpt", "Let me see."), ("function_call", call)]
    said += [("function_call", call), ("observation", "1"), ("tool", "2"), ("gpt", "a")]
    row = {"conversations": [{"from": role, "value": value} for role, value in said]}
    [found] = conversations(save("a.json", json.dumps([row])))
    assert [message.role for message in found.messages] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]
    assert found.messages[1].content == "Let me see."
    assert len(found.messages[1].tool_calls) == 2


def test_openai_messages_with_tools_parts_and_identity(save: Save) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "S"},
            {"role": "user", "content": [{"type": "text", "text": part} for part in "ab"]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "f"},
            {"role": "assistant", "content": "c"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "identity": {"name": "N", "author": "A"},
    }  # fmt: skip
    [found] = conversations(save("a.jsonl", jsonl(row)))
    assert turns(found)[:2] == [("system", "S"), ("user", "ab")]
    assert found.messages[2].tool_calls[0]["function"]["arguments"] == {"x": 1}
    assert found.messages[2].tool_calls[0]["id"] == "c1"
    assert found.messages[3] == Message("tool", "3", name="f", tool_call_id="c1")
    assert found.identity == Identity("N", "A")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"instruction": "a", "output": "b", "output": "c"}', "duplicate-key"),
        ('{"instruction": "a", "output": NaN}', "not-a-number"),
        ('{"instruction": "a", "output": "\\ud800"}', "encoding"),
        ('{"instruction": "a", "output": ' + "[" * 100_000 + "}", "broken-row"),
        ('{"instruction": "a", "output": ' + "9" * 5000 + "}", "broken-row"),
        ('{"instruction": "a", "output": 3}', "wrong-type"),
        ('{"instruction": "a", "output": null}', "missing-field"),
        ('{"instruction": "a"}', "missing-field"),
        ('{"output": "a"}', "missing-field"),
        ('{"text": "a"}', "unknown-form"),
        ('{"messages": "hello"}', "broken-row"),
        ('{"messages": {"role": "user"}}', "wrong-type"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "unknown-role"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "unknown-role"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "wrong-type"),
        ('{"messages": [{"role": "user"}]}', "missing-field"),
        ('{"messages": [{"role": "user", "tool_calls": {"name": "f"}}]}', "role-order"),
        ('{"conversations": [{"from": "function_call", "value": "f(x)"}]}', "broken-row"),
        ('{"conversations": [{"from": "function_call", "value": "{}"}]}', "missing-field"),
        ('{"conversations": [], "tools": "[{}]"}', "missing-field"),
        ('{"system": "a", "messages": [{"role": "system", "content": "b"}]}', "role-order"),
        ('{"instruction": "a", "output": "b", "history": [["c"]]}', "wrong-type"),
    ],
)  # fmt: skip
def test_a_bad_row_is_a_finding_with_a_fix(save: Save, text: str, kind: str) -> None:
    for file in (save("a.jsonl", text + "\n"), save("a.json", f"[\n{text}\n]")):
        first = next(item for item in read([file]))
        assert isinstance(first, Finding)
        assert (first.kind, first.severity) == (kind, "error")
        assert first.place.line == (1 if file.suffix == ".jsonl" else 2)
        assert first.fix


def test_deep_arguments_are_refused_before_they_are_hashed(save: Save) -> None:
    deep = "[" * 300 + "]" * 300
    call = f'{{"name": "f", "arguments": {{"x": {deep}}}}}'
    row = {"conversations": [{"from": "function_call", "value": call}]}
    [finding] = findings(save("a.jsonl", jsonl(row)))
    assert finding.kind == "wrong-type"
    assert finding.field == "conversations[0].value.arguments"


def test_unknown_fields_name_what_was_found_and_what_is_accepted(save: Save) -> None:
    for file in (save("a.jsonl", jsonl({"text": "x", "label": 1})), save("a.csv", "text,label\n")):
        [finding] = findings(file)
        assert "text, label" in finding.problem
        for form in ("messages", "conversations", "instruction"):
            assert form in finding.fix


def test_an_unused_field_is_named_once(save: Save) -> None:
    message = {"role": "user", "content": "q", "weight": 0}
    answer = {"role": "assistant", "content": "a"}
    row = {"messages": [message, answer], "sytem": "typo", "note": None}
    found = findings(save("a.jsonl", jsonl(row, row)))
    assert [(item.field, item.severity) for item in found] == [
        ("sytem", "warning"),
        ("messages[].weight", "warning"),
    ]
