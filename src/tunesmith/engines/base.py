"""What every inference engine does: token ids in, token ids out, one at a time."""

import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from tunesmith.errors import EngineError, UsageError
from tunesmith.language import t

Finish = Literal["stop", "length"]
Tokens = Generator[int, None, Finish]
"""Yields token ids; returns "stop" if the model ended, "length" if a limit did."""

MOST_TEMPERATURE = 2.0
MOST_SEED = 2**32 - 2  # llama.cpp takes 2**32 - 1 for "no seed"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy.

    The logits are divided by `temperature`, then the likeliest tokens that together reach `top_p`
    are kept; nothing else (top-k, min-p, penalties) is at work.

    Raises:
        UsageError: A value is out of range.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    max_tokens: int = 512
    seed: int = 42

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, MOST_TEMPERATURE)
        _check("top_p", self.top_p, 0.0, 1.0)
        _check("max_tokens", self.max_tokens, 1, None)
        _check("seed", self.seed, 0, MOST_SEED)


def _check(name: str, value: float, low: float, high: float | None) -> None:
    if not (value >= low and (high is None or value <= high)):
        raise UsageError(
            t(
                "{name} {value} is out of range; allowed: {bounds}.",
                name=name,
                value=value,
                bounds=f"{low:g} …" if high is None else f"{low:g} … {high:g}",
            )
        )


GREEDY = Sampling(temperature=0.0, top_p=1.0)


class Stop:
    """The wish to end an answer; any thread may make it, at any time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._actions: list[Callable[[], None]] = []
        self.asked = False

    def ask(self) -> None:
        """End the answer, even while the engine still reads the prompt."""
        with self._lock:
            self.asked = True
        for action in self._actions:
            action()

    def on_ask(self, action: Callable[[], None]) -> None:
        """Have `action` called when the wish is made, at once if it was."""
        with self._lock:
            self._actions.append(action)
        if self.asked:
            action()


class Engine(Protocol):
    """A loaded model, with at most one adapter that each request switches on or off."""

    name: str

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        ...

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter was loaded."""
        ...

    def generate(
        self,
        input_ids: Sequence[int],
        sampling: Sampling,
        *,
        stop_ids: frozenset[int],
        adapter: bool = True,
        stop: Stop | None = None,
    ) -> Tokens:
        """Yield new token ids until one of `stop_ids` (not yielded) or `max_tokens`.

        Closing the generator stops the work; so does `stop`, from any thread. Several threads may
        call at once.

        Raises:
            EngineError: The engine died, or the prompt does not fit its context.
        """
        ...

    def close(self) -> None:
        """Free the model; calling it twice does no harm."""
        ...


def check_prompt(count: int, context_length: int) -> None:
    """Refuse a prompt that leaves no room for an answer.

    Raises:
        EngineError: With both counts.
    """
    if count == 0:
        raise EngineError(t("The prompt is empty; ask something."))
    if count >= context_length:
        raise EngineError(
            t(
                "The conversation has {count} tokens, but the model's context holds {context}; "
                "shorten it, or begin a new one (/reset in chat).",
                count=count,
                context=context_length,
            )
        )
