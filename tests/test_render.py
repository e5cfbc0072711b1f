"""The renderer: hand-checked masks, agreement with transformers, and what must always hold."""

import functools
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers_templates import (
    FAMILIES,
    GOLDEN,
    TOOLS,
    backend,
    family_tokenizer,
    marked,
    talk,
    template,
    tool_talk,
)
from tunesmith.data.messages import Conversation, Message, Place
from tunesmith.data.packs import Sample
from tunesmith.data.render import Renderer
from tunesmith.errors import DataError

CALLS_TOOLS = ("qwen2.5", "qwen3", "llama3.1")


def conversations(name: str) -> dict[str, Conversation]:
    """What each family's golden file shows."""
    family = FAMILIES[name]
    three = talk(
        ("你是谁？", "我是小明。"),
        ("Thanks", " You are welcome! "),
        ("Bye", "再见"),
        system="Be kind.",
    )
    found = {
        "one turn": Conversation(talk(("Who are you?", "I am Ming."))),
        "three turns with a system prompt": Conversation((*three, Message("user", "unanswered"))),
        "control tokens typed as text": Conversation(
            talk((f"say {family.special[-1]} {family.eos}", family.eos + "!"))
        ),
    }
    if name in CALLS_TOOLS:
        found["a tool call"] = tool_talk({"city": "Paris"})
    if name == "qwen3":
        thoughts = ("<think>\nEasy.\n</think>\n\n2", "<think>\nHm.\n</think>\n\n4")
        turns = zip(("1+1?", "2+2?"), thoughts, strict=True)
        found["thinking"] = Conversation(talk(*turns))
    return found


def golden(name: str) -> dict[str, list[str]]:
    text = (GOLDEN / "masks" / f"{name}.txt").read_text(encoding="utf-8")
    sections = [part.partition("\n") for part in text.removeprefix("### ").split("\n### ")]
    found: dict[str, list[str]] = {}
    title = ""
    for heading, _, body in sections:
        title = title if heading == "next sample" else heading
        found.setdefault(title, []).append(body)
    found[title][-1] = found[title][-1].removesuffix("\n")
    return found


@functools.cache
def renderer(name: str, *, thinking: bool = False) -> Renderer:
    return Renderer(family_tokenizer(name), thinking=thinking)


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_are_the_hand_checked_ones(name: str) -> None:
    tokenizer = family_tokenizer(name)
    expected = golden(name)
    shown = {
        title: [
            marked(sample, tokenizer)
            for sample in renderer(name, thinking=title == "thinking").sample(conversation)
        ]
        for title, conversation in conversations(name).items()
    }
    assert shown == expected


@functools.cache
def transformers_tokenizer(name: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    make: Any = PreTrainedTokenizerFast
    return make(
        tokenizer_object=backend(family),
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=template(name),
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_writes_what_transformers_writes(name: str) -> None:
    """The same text and ids, where the template needs no help with the system prompt."""
    for title, conversation in conversations(name).items():
        if "typed" in title or title == "thinking":
            continue
        messages = list(conversation.messages)
        if name in ("gemma2", "mistral-v0.3") and messages[0].role == "system":
            messages = messages[1:]
        messages = messages[: 3 if messages[0].role == "system" else 2][:-1]
        expected = transformers_tokenizer(name).apply_chat_template(
            [message.as_dict() for message in messages],
            tools=list(conversation.tools) or None,
            add_generation_prompt=True,
            enable_thinking=False,
            date_string="26 Jul 2024",
            return_dict=False,
        )
        assert renderer(name).prompt(messages, conversation.tools) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_cutting_into_pieces_changes_no_id(name: str) -> None:
    """Whole histories are encoded as if never cut, SentencePiece tokenizers included."""
    tokenizer = family_tokenizer(name)
    for title, conversation in conversations(name).items():
        if "typed" not in title:
            for sample in renderer(name, thinking=title == "thinking").sample(conversation):
                text = tokenizer.decode(sample.input_ids, skip_special=False)
                assert tokenizer.encode(text) == list(sample.input_ids)


PIECES = st.sampled_from(
    (
        *("<|im_end|>", "<|im_start|>", "<|eot_id|>", "</s>", "[INST]", "<end_of_turn>", "<bos>"),
        *(
            "\n",
            "\n\n",
            " ",
            "a",
            "Hello",
            "你好",
            "é",
            "👍🏽",
            "\ufffd",
            "\U000f0000",
            "\U000f0001",
        ),
        *("<think>", "</think>", "{{ x }}", "{% for %}", "assistant\n", "<", "|", "\x1b", "\u202e"),
    )
)
TEXT = st.lists(PIECES, max_size=6).map("".join)
TALK = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)
SYSTEM = st.none() | TEXT
thorough = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def trained_runs(sample: Sample) -> list[tuple[int, int]]:
    """Where trained stretches begin and end."""
    runs, start = [], 0
    for trained, group in groupby(sample.trained):
        stop = start + len(list(group))
        if trained:
            runs.append((start, stop))
        start = stop
    return runs


@pytest.mark.parametrize("name", FAMILIES)
@thorough
@given(turns=TALK, system=SYSTEM)
def test_every_answer_is_trained_after_exactly_what_is_asked(
    name: str, turns: list[tuple[str, str]], system: str | None
) -> None:
    messages = talk(*turns, system=system)
    asking = renderer(name, thinking=True)
    starts = [
        (sample.input_ids[:start], sample.input_ids[start:stop])
        for sample in asking.sample(Conversation(messages))
        for start, stop in trained_runs(sample)
    ]
    asked = [
        tuple(asking.prompt(messages[:at]))
        for at, message in enumerate(messages)
        if message.role == "assistant"
    ]
    assert [start for start, _ in starts] == asked
    assert all(answer[-1] in asking.stop_ids for _, answer in starts)


@pytest.mark.parametrize("name", FAMILIES)
@thorough
@given(turns=TALK, system=SYSTEM)
def test_no_message_can_write_a_control_token(
    name: str, turns: list[tuple[str, str]], system: str | None
) -> None:
    control = frozenset(family_tokenizer(name).special_tokens.values())
    harmless = talk(*[("x", "x") for _ in turns], system=None if system is None else "x")
    found = renderer(name).prompt(talk(*turns, system=system))
    expected = renderer(name).prompt(harmless)
    assert [id for id in found if id in control] == [id for id in expected if id in control]


@pytest.mark.parametrize("name", ["smollm2", "qwen2.5", "generation-tag"])
@thorough
@given(turns=TALK, system=SYSTEM)
def test_text_goes_through_unchanged(
    name: str, turns: list[tuple[str, str]], system: str | None
) -> None:
    tokenizer = family_tokenizer(name)
    messages = talk(*turns, system=system)
    (sample,) = renderer(name).sample(Conversation(messages))
    answers = [
        tokenizer.decode(sample.input_ids[start:stop], skip_special=False)
        for start, stop in trained_runs(sample)
    ]
    assert answers == [answer + "<|im_end|>" for _, answer in turns]
    text = tokenizer.decode(renderer(name).prompt(messages), skip_special=False)
    blocks = [f"<|im_start|>{message.role}\n{message.content}<|im_end|>\n" for message in messages]
    assert text.endswith("".join(blocks) + "<|im_start|>assistant\n")


def test_what_the_template_refuses_is_named_by_place() -> None:
    messages = (Message("user", "a"), Message("user", "b"), Message("assistant", "c"))
    conversation = Conversation(messages, place=Place(Path("rows.jsonl"), 7))
    with pytest.raises(DataError, match=r"^rows\.jsonl:7: .*roles must alternate"):
        renderer("gemma2").sample(conversation)


def test_thoughts_cannot_be_trained_where_none_are_asked_for() -> None:
    conversation = conversations("qwen3")["thinking"]
    with pytest.raises(DataError, match=r"message 2 .* thoughts"):
        renderer("qwen3").sample(conversation)


def test_half_a_character_is_refused() -> None:
    with pytest.raises(DataError, match=r"U\+D83D"):
        renderer("qwen2.5").prompt([Message("user", json.loads('"\\ud83d"'))])


def test_a_greeting_before_the_first_question_can_be_asked_after() -> None:
    messages = [Message("assistant", "Can I help?"), Message("user", "Yes")]
    text = family_tokenizer("smollm2").decode(renderer("smollm2").prompt(messages))
    assert text.endswith("Can I help?\nuser\nYes\nassistant\n")


@pytest.mark.parametrize("name", CALLS_TOOLS)
def test_arguments_of_tool_calls_may_be_json_text(name: str) -> None:
    as_text = tool_talk('{"city": "Paris"}')
    assert renderer(name).sample(as_text) == renderer(name).sample(tool_talk({"city": "Paris"}))
    with pytest.raises(DataError, match="not JSON"):
        renderer(name).sample(tool_talk("{city}"))


def test_control_tokens_in_tools_are_text() -> None:
    tools = ({"type": "function", "function": {"name": "a<|im_end|>", "<|im_start|>": 1}},)
    prompt = renderer("qwen2.5").prompt([Message("user", "Hi")], tools)
    plain = renderer("qwen2.5").prompt([Message("user", "Hi")], TOOLS)
    ids = set(family_tokenizer("qwen2.5").special_tokens.values())
    assert sum(id in ids for id in prompt) == sum(id in ids for id in plain)


def test_the_fingerprint_is_that_of_the_text() -> None:
    import hashlib

    assert (
        renderer("gemma2").template_sha256
        == hashlib.sha256(template("gemma2").encode()).hexdigest()
    )


def test_rendering_imports_neither_torch_nor_transformers() -> None:
    import subprocess
    import sys

    code = "import sys, tunesmith.data.render; print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
