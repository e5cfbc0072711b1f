"""Conversations to token ids. The only caller of a model's chat template.

A conversation is written by the template turn by turn, and cut where an answer begins and ends:

    <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎ ┃ Hello!<|im_end|> ┃ ⏎<|im_start|>user⏎…
                    prompt                                    trained            prompt

Each piece is encoded on its own, in training and in chat. So what a model is asked is, id for id,
what it was trained to answer: `prompt(messages[:i])` opens the sample that trains answer `i`.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tunesmith.data.chat_format import ChatFormat, ChatTokenizer
from tunesmith.data.messages import Conversation, Message
from tunesmith.data.packs import Sample
from tunesmith.errors import DataError
from tunesmith.language import t

# A control token's text inside a message is swapped for one character from here while the template
# runs, so that only what the template itself writes can become a control token.
_PRIVATE = 0xF0000
_PRIVATE_TEXT = "[\U000f0000-\U000fffff]"
_CONTEXT_CHARS = 200


class Renderer:
    """A model's chat template with its tokenizer, proven on a short conversation.

    - The system prompt goes where the template puts it. If the template refuses or loses it, it
      opens the first user message. If none is given, the template's own default stays.
    - A model that can think before it answers is asked to only with `thinking=True`. Where the
      template opens a thought all the same and shows none, the answer begins by closing it.
    - The day a template asks for is always 26 July 2024: the same ids today and tomorrow.
    - An answer ends with the control token that the template writes after it; if it writes none,
      with the tokenizer's end token.
    - A model without a template is given ChatML if it knows ChatML's tokens.

    Raises:
        ModelError: There is no template, it is unsafe, or what it asks is not what it teaches.
    """

    def __init__(self, tokenizer: ChatTokenizer, *, thinking: bool = False) -> None:
        self.tokenizer = tokenizer
        self._format = ChatFormat(tokenizer, thinking=thinking)

    @property
    def template_sha256(self) -> str:
        """The fingerprint of the template's text, 64 hexadecimal digits."""
        return self._format.template.sha256

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer: what the template writes after one, the tokenizer's eos."""
        first = self._format.special.match(self._format.end.text)
        end = self.tokenizer.special_tokens.get(first[0]) if first else None
        ids = {end, self.tokenizer.eos_token_id}
        return frozenset(id for id in ids if id is not None)

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        """The ids after which the model answers `messages`.

        Raises:
            DataError: The template refuses these messages.
        """
        script = _Script(self._format, messages, tools)
        return list(script.rendered(script.prompt(len(messages))).input_ids)

    def sample(self, conversation: Conversation) -> list[Sample]:
        """What trains the answers of `conversation`, each of them once.

        One sample, unless the template writes earlier turns differently later on, as Qwen3 drops
        old thoughts: then one per stretch that stays as it was asked.
        What follows the last answer is left out.

        Raises:
            DataError: The template refuses these messages.
        """
        try:
            script = _Script(self._format, conversation.messages, conversation.tools)
            return [script.rendered(chain) for chain in script.chains()]
        except DataError as error:
            if conversation.place is None:
                raise
            raise DataError(f"{conversation.place}: {error}") from error


class _Piece(NamedTuple):
    text: str
    trained: bool


class _Script:
    """One conversation as its template writes it, cut into pieces."""

    def __init__(
        self, format: ChatFormat, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> None:
        self._format = format
        self._foreign = re.compile(f"{format.special.pattern}|{_PRIVATE_TEXT}")
        self._stand_ins: dict[str, str] = {}
        self._tools = self._masked(list(tools)) or None
        self._messages = [self._masked(format.as_dict(message)) for message in messages]
        self._answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        self._texts: dict[tuple[int, bool], str] = {}

    def text(self, count: int, *, ask: bool) -> str:
        """What the template writes for the first `count` messages."""
        if (count, ask) not in self._texts:
            messages = self._messages[:count]
            self._texts[count, ask] = self._format.text(messages, self._tools, ask=ask)
        return self._texts[count, ask]

    def prompt(self, count: int) -> list[_Piece]:
        """The first `count` messages and the request to answer, cut around earlier answers."""
        text = self.text(count, ask=True)
        pieces, done = [], 0
        for turn in self._answers:
            asked = self._asked(turn) if turn < count and self._format.end.written else None
            if asked is not None and text.startswith(asked):
                start, stop = len(asked), self._format.end_after(text, len(asked))
                pieces += [_Piece(text[done:start], False), _Piece(text[start:stop], False)]
                done = stop
        return [*pieces, _Piece(text[done:], False)]

    def answer(self, turn: int) -> _Piece:
        """The answer that message `turn` gives, its end of turn included."""
        asked, answered = self.text(turn, ask=True), self.text(turn + 1, ask=False)
        said = self._format.answer(asked, answered)
        thought = "</think>" in self._messages[turn]["content"]
        if said is None or (thought and not answered.startswith(asked)):
            raise DataError(
                t(
                    "The model's chat template asks for message {number} in another way than it"
                    " writes it, so it cannot be trained; take out the message, or its thoughts"
                    " (<think>…</think>) if the model is not asked to think.",
                    number=turn + 1,
                )
            )
        return _Piece(said, True)

    def chains(self) -> Iterator[list[_Piece]]:
        """Stretches in which each prompt goes on from the answer before it."""
        chain: list[_Piece] = []
        for turn in self._answers:
            prompt = self.prompt(turn)
            if chain and not _goes_on(chain, prompt):
                yield chain
                chain = []
            chain = [*chain, *prompt[len(chain) :], self.answer(turn)]
        if chain:
            yield chain

    def rendered(self, pieces: list[_Piece]) -> Sample:
        """The ids of `pieces`; those of a message's own text are never control tokens."""
        ids: list[int] = []
        trained: list[bool] = []
        before = ""
        for piece in pieces:
            # Every second part is a stand-in, whose text must not become a control token.
            for number, part in enumerate(re.split(f"({_PRIVATE_TEXT})", piece.text)):
                if number % 2:
                    ids += self._encode(before and "\n", self._literal(part), special=False)
                    before = "\n"
                elif part:
                    ids += self._encode(self._context(before), part, special=True)
                    before = part
            trained += [piece.trained] * (len(ids) - len(trained))
        return Sample(tuple(ids), tuple(trained))

    def _encode(self, context: str, text: str, *, special: bool) -> list[int]:
        """The ids of `text` where it stands, after `context`.

        SentencePiece tokenizers put a space before what opens a text, so what stands before it
        comes along and is taken off again.
        """
        encode = self._format.tokenizer.encode
        head = encode(context, special=special) if context else []
        ids = encode(context + text, special=special)
        return ids[len(head) :] if ids[: len(head)] == head else encode(text, special=special)

    def _context(self, before: str) -> str:
        """The end of `before`, from its last control token on."""
        marks = [match.start() for match in self._format.special.finditer(before)]
        return before[marks[-1] :] if marks else before[-_CONTEXT_CHARS:]

    def _asked(self, turn: int) -> str | None:
        """What was asked before message `turn`; None if the template does not ask there."""
        try:
            return self.text(turn, ask=True)
        except DataError:
            return None

    def _masked(self, value: Any) -> Any:
        """`value` with control tokens, and the characters that stand in for them, swapped."""
        if isinstance(value, str):
            return self._foreign.sub(self._stand_in, value)
        if isinstance(value, dict):
            return {self._masked(key): self._masked(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._masked(item) for item in value]
        return value

    def _stand_in(self, match: re.Match[str]) -> str:
        return self._stand_ins.setdefault(match[0], chr(_PRIVATE + len(self._stand_ins)))

    def _literal(self, stand_in: str) -> str:
        return list(self._stand_ins)[ord(stand_in) - _PRIVATE]


def _goes_on(chain: list[_Piece], prompt: list[_Piece]) -> bool:
    """Whether `prompt` opens with the texts of `chain`."""
    opening = prompt[: len(chain)]
    return [piece.text for piece in opening] == [piece.text for piece in chain]
