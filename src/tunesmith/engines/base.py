"""What every inference engine does: token ids in, token ids out, one at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy."""

    temperature: float = 0.7
    top_p: float = 0.9
    max_tokens: int = 512
    seed: int = 42


GREEDY = Sampling(temperature=0.0, top_p=1.0)


class Engine(Protocol):
    """A loaded model, with at most one adapter that each request switches on or off."""

    name: str
    context_length: int
    has_adapter: bool

    def generate(
        self,
        input_ids: Sequence[int],
        sampling: Sampling,
        *,
        stop_ids: frozenset[int],
        adapter: bool = True,
    ) -> Iterator[int]:
        """Yield new token ids until one of `stop_ids` (not yielded) or `max_tokens`.

        Closing the iterator stops the work. Several threads may call at once.

        Raises:
            EngineError: The engine died, or the prompt does not fit its context.
        """
        ...

    def close(self) -> None:
        """Free the model; calling it twice does no harm."""
        ...
