"""What is known of a model's chat template, found by trying it on a short conversation."""

import json
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from tunesmith.data.messages import Message
from tunesmith.data.template import ChatTemplate
from tunesmith.errors import DataError, ModelError
from tunesmith.language import t

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


_QUESTION = {"role": "user", "content": "Question"}
_ANSWER = {"role": "assistant", "content": "Answer"}
_SYSTEM = {"role": "system", "content": "Rules"}


class ChatTokenizer(Protocol):
    """What rendering needs of a tokenizer."""

    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    special_tokens: dict[str, int]

    @property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token`."""
        ...

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of `text`, nothing added; with `special=False` control tokens are plain text."""
        ...

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`."""
        ...


class End(NamedTuple):
    """How answers end, and how they begin.

    Attributes:
        text: What ends an answer, from its first control token to its last.
        written: Whether the template writes it, or we must.
        skipped: What the template asks with but leaves out where it shows the answer: Gemma 4 asks
            with an empty thought, DeepSeek-R1 with an open one.
        closing: What closes a thought that `skipped` leaves open.
    """

    text: str
    written: bool
    skipped: str
    closing: str


class ChatFormat:
    """A chat template, and what it does with an answer, a system prompt and a tool call.

    Raises:
        ModelError: There is no template, it is unsafe, or its answers cannot be trained.
    """

    def __init__(self, tokenizer: ChatTokenizer, *, thinking: bool) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(_template_source(tokenizer))
        self.special = _special_pattern(tokenizer)
        tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        self._variables: dict[str, Any] = {k: v for k, v in tokens.items() if v is not None}
        self._variables |= {"enable_thinking": thinking, "thinking": thinking}
        self.end = self._find_end()

    def text(self, messages: list[Any], tools: list[Any] | None, *, ask: bool) -> str:
        """What the template writes for `messages`, with the request to answer if `ask`.

        Raises:
            DataError: The template refuses these messages.
        """
        if messages and messages[0]["role"] == "system" and self._folds_system:
            messages = _fold_system(messages)
        return _whole(self._write(messages, tools, ask=ask))

    def as_dict(self, message: Message) -> dict[str, Any]:
        """The message as this template takes it, the arguments of tool calls as it wants them."""
        plain = message.as_dict()
        if message.tool_calls:
            as_text = self._wants_json_text
            plain["tool_calls"] = [_with_arguments(call, as_text) for call in message.tool_calls]
        return plain

    def answer(self, asked: str, answered: str) -> str | None:
        """What the model says from `asked` to `answered`, its end of turn included.

        None if `answered` does not go on from `asked`.
        """
        end = self.end
        if answered.startswith(asked):
            said = answered[len(asked) :]
        else:
            opening = asked.removesuffix(end.skipped)
            if opening == asked or not answered.startswith(opening):
                return None
            said = end.closing + answered[len(opening) :]
        return said[: self.end_after(said, 0)] if end.written else said.rstrip() + end.text

    def end_after(self, text: str, start: int) -> int:
        """Where the answer that begins at `start` ends, or the end of the text."""
        found = text.find(self.end.text, start)
        return len(text) if found < 0 else found + len(self.end.text)

    def _write(self, messages: list[Any], tools: list[Any] | None, *, ask: bool) -> str:
        return self.template.render(
            messages=messages, tools=tools, add_generation_prompt=ask, **self._variables
        )

    def _find_end(self) -> End:
        try:
            asked = self._write([_QUESTION], None, ask=True)
            shown = self._write([_QUESTION], None, ask=False)
            answered = self._write([_QUESTION, _ANSWER], None, ask=False)
            later = self._write([_QUESTION, _ANSWER, _QUESTION], None, ask=True)
        except DataError as error:
            raise _unfit(str(error)) from error
        opening = _common_start(asked, answered)
        skipped = asked[len(opening) :]
        before, found, after = answered[len(opening) :].partition("Answer")
        if not found:
            raise _unfit(t("it does not show the answer"))
        if skipped and (before.strip() or not opening.startswith(shown)):
            raise _unfit(t("what it asks is not how the answer it shows begins"))
        opens = skipped.count("<think>") > skipped.count("</think>")
        shared = _common_start(after, later.rpartition("Answer")[2])
        end = self._closed(shared) or self._closed(after) or self.tokenizer.eos_token
        if not end:
            raise _unfit(t("nothing marks the end of an answer"))
        return End(end, end in after, skipped, "\n</think>\n\n" if opens else "")

    def _closed(self, after: str) -> str:
        """From the first control token to the last."""
        tokens = list(self.special.finditer(after))
        return after[tokens[0].start() : tokens[-1].end()] if tokens else ""

    @cached_property
    def _folds_system(self) -> bool:
        """Whether the template refuses a system prompt (Gemma 2), or loses it (Mistral).

        Mistral's writes it in the last message if that is the user's, so no longer once answered.
        """
        try:
            asked = self._write([_SYSTEM, _QUESTION], None, ask=True)
            answered = self._write([_SYSTEM, _QUESTION, _ANSWER], None, ask=False)
        except DataError:
            return True
        return "Rules" not in asked or self.answer(asked, answered) is None

    @cached_property
    def _wants_json_text(self) -> bool:
        """Whether tool calls carry their arguments as JSON text here, not as an object."""
        function = {"name": "probe", "arguments": {"key": "value"}}
        call = {"type": "function", "id": "callid123", "function": function}
        try:
            self._write([_QUESTION, _ANSWER | {"tool_calls": [call]}], None, ask=False)
        except DataError:
            return True
        return False


def _common_start(one: str, other: str) -> str:
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _special_pattern(tokenizer: ChatTokenizer) -> re.Pattern[str]:
    """Finds control tokens, longer ones first."""
    named = {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
    tokens = sorted({*tokenizer.special_tokens, *named}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def _template_source(tokenizer: ChatTokenizer) -> str:
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    if {"<|im_start|>", "<|im_end|>"} <= tokenizer.special_tokens.keys():
        return CHATML
    raise ModelError(
        t(
            "The model has no chat template, so nothing says how to talk to it; use its chat or"
            " instruct version, or add a chat_template.jinja to its folder."
        )
    )


def _unfit(reason: str) -> ModelError:
    return ModelError(
        t(
            "The model's chat template cannot be trained with: {reason}; use the model's original"
            " template.",
            reason=reason.rstrip("."),
        )
    )


def _with_arguments(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    function = dict(call.get("function", {}))
    arguments = function.get("arguments", {})
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif isinstance(arguments, str) and not as_text:
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise DataError(
                t("The arguments of a tool call are not JSON: {reason}.", reason=error)
            ) from error
    return call | {"function": function | {"arguments": arguments}}


def _fold_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The system prompt put before the first user message, as Gemma 3 and Llama 2 do."""
    system, *rest = messages
    if not rest or rest[0]["role"] != "user":
        return messages
    return [rest[0] | {"content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def _whole(text: str) -> str:
    """`text`, unless it holds half a character, which JSON can spell and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            t(
                "A message holds half a character (a lone surrogate, {code}); take it out.",
                code=f"U+{ord(text[error.start]):04X}",
            )
        ) from error
    return text
