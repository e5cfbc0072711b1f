"""What is found out about a template: how its answers begin and end, or why it is refused."""

import dataclasses

import pytest

from tests.helpers_templates import (
    FAMILIES,
    Family,
    family_tokenizer,
    marked,
    talk,
    tokenizer_for,
    tool_talk,
)
from tunesmith.data.chat_format import CHATML
from tunesmith.data.messages import Conversation
from tunesmith.data.render import Renderer
from tunesmith.errors import DataError, ModelError


def made(chat_template: str | None, family: Family = FAMILIES["qwen2.5"]) -> Renderer:
    return Renderer(tokenizer_for(family, chat_template))


def test_stop_ids_are_the_end_of_turn_and_the_eos() -> None:
    tokenizer = family_tokenizer("gemma2")
    named = (tokenizer.special_tokens["<end_of_turn>"], tokenizer.special_tokens["<eos>"])
    assert Renderer(family_tokenizer("gemma2")).stop_ids == frozenset(named)


def test_a_base_model_with_another_eos_still_stops_at_the_end_of_turn() -> None:
    base = dataclasses.replace(FAMILIES["qwen2.5"], eos="<|endoftext|>")
    tokenizer = tokenizer_for(base, None)
    ids = {tokenizer.special_tokens[token] for token in ("<|im_end|>", "<|endoftext|>")}
    assert Renderer(tokenizer).stop_ids == ids


def test_no_template_means_chatml_if_its_tokens_are_known() -> None:
    conversation = Conversation(talk(("Hi", "Hello")))
    assert made(None).sample(conversation) == made(CHATML).sample(conversation)
    with pytest.raises(ModelError, match="no chat template"):
        made(None, FAMILIES["llama3"])


def test_an_answer_the_template_does_not_end_is_ended_with_eos() -> None:
    unended = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = tokenizer_for(FAMILIES["qwen2.5"], unended)
    samples = Renderer(tokenizer).sample(Conversation(talk(("Hi", "One"), ("More", "Two"))))
    assert [marked(sample, tokenizer) for sample in samples] == [
        "<|im_start|>user\nHi\n<|im_start|>assistant\n⟦One<|im_end|>⟧",
        "<|im_start|>user\nHi\n<|im_start|>assistant\nOne\n<|im_start|>user\nMore\n"
        "<|im_start|>assistant\n⟦Two<|im_end|>⟧",
    ]


ASKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + THOUGHT }}{% endif %}"
)


HEADED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + (HEAD if m.role == 'assistant' else '') }}"
    "{{ '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant[now]\n' }}{% endif %}"
)


def test_an_open_thought_that_is_never_shown_is_closed_by_the_answer() -> None:
    tokenizer = tokenizer_for(FAMILIES["qwen2.5"], ASKING.replace("THOUGHT", "'<think>\n'"))
    (sample,) = Renderer(tokenizer).sample(Conversation(talk(("Hi", "One"))))
    assert marked(sample, tokenizer) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
        "⟦\n</think>\n\nOne<|im_end|>⟧"
    )
    with pytest.raises(DataError, match="thoughts"):
        Renderer(tokenizer).sample(Conversation(talk(("Hi", "Hm.\n</think>\n\nOne"))))


ENDED_TWICE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|im_end|><|endoftext|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_all_that_ends_an_answer_is_trained_and_its_first_token_stops() -> None:
    tokenizer = tokenizer_for(
        dataclasses.replace(FAMILIES["qwen2.5"], eos="<|endoftext|>"), ENDED_TWICE
    )
    ending = Renderer(tokenizer)
    (sample,) = ending.sample(Conversation(talk(("Hi", "One"), ("More", "Two"))))
    text = marked(sample, tokenizer)
    assert "⟦One<|im_end|><|endoftext|>⟧" in text
    assert "⟦Two<|im_end|><|endoftext|>⟧" in text
    tokens = ("<|im_end|>", "<|endoftext|>")
    assert ending.stop_ids == {tokenizer.special_tokens[token] for token in tokens}


def test_an_end_that_only_the_last_answer_has_is_trained_for_each() -> None:
    chat_template = ENDED_TWICE.replace(
        "'<|im_end|><|endoftext|>\n'",
        "'<|endoftext|>' if loop.last and m.role == 'assistant' else '<|im_end|>\n'",
    )
    tokenizer = tokenizer_for(
        dataclasses.replace(FAMILIES["qwen2.5"], eos="<|endoftext|>"), chat_template
    )
    samples = Renderer(tokenizer).sample(Conversation(talk(("Hi", "One"), ("More", "Two"))))
    answers = [marked(sample, tokenizer).partition("⟦")[2] for sample in samples]
    assert answers == ["One<|endoftext|>⟧", "Two<|endoftext|>⟧"]


def test_an_empty_thought_that_is_asked_with_but_never_shown_stays_in_the_prompt() -> None:
    tokenizer = tokenizer_for(FAMILIES["qwen2.5"], ASKING.replace("THOUGHT", "'<think></think>'"))
    messages = talk(("Hi", "One"), ("More", "Two"), system="Be kind.")
    opening = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    samples = Renderer(tokenizer).sample(Conversation(messages))
    assert [marked(sample, tokenizer) for sample in samples] == [
        opening + "<|im_start|>assistant\n<think></think>⟦One<|im_end|>⟧",
        opening + "<|im_start|>assistant\nOne<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>⟦Two<|im_end|>⟧",
    ]


@pytest.mark.parametrize(
    ("chat_template", "reason"),
    [
        ("{{ 'ask' if add_generation_prompt else messages[-1].content }}", "not how the answer"),
        (HEADED.replace("HEAD", "'[later]'"), "not how the answer"),
        ("{{ messages[0].content }}", "does not show the answer"),
        ("{{ raise_exception('never') }}", "never"),
        ("{% for m in messages %}{{ m.tone + 1 }}{% endfor %}", "tone"),
    ],
)
def test_a_template_that_cannot_be_trained_is_refused(chat_template: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        made(chat_template)


def test_a_template_whose_answers_have_no_end_is_refused() -> None:
    tokenizer = tokenizer_for(
        FAMILIES["qwen2.5"], "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="nothing marks the end"):
        Renderer(tokenizer)


def test_a_template_that_joins_arguments_gets_json_text() -> None:
    joining = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% for call in m.tool_calls %}{{ call.function.arguments + '' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = tokenizer_for(FAMILIES["qwen2.5"], joining)
    (sample,) = Renderer(tokenizer).sample(tool_talk({"city": "巴黎"}))
    assert '⟦{"city": "巴黎"}<|im_end|>⟧' in marked(sample, tokenizer)
