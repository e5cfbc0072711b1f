"""How far tuning has moved a model from its base, where there was nothing to learn.

The base answers neutral questions that are never trained on, before the first step, and its
distribution over the next token is seen at each token of its answers. Later the tuned model reads
the same, and the two distributions are compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunesmith.data.packs import Pack, Sample, pack
from tunesmith.data.passes import passes
from tunesmith.training.compiled import uncompiled
from tunesmith.training.forward import arithmetic, said_states
from tunesmith.training.head import Head

if TYPE_CHECKING:
    from peft import PeftModel

AT_ONCE = 512  # tokens of a forward pass
ROWS = 64  # whose distributions are compared at once


@dataclass(frozen=True)
class Drift:
    """Of a tuned model from its base, over the tokens of the base's answers.

    Attributes:
        kl: KL(base ‖ tuned) of the next token's distribution, the mean, in nats.
        agreement: Share of tokens at which both find the same one likeliest.
    """

    kl: float
    agreement: float


class Probe:
    """The base's answers, and the base there: to be made while the model still is its base."""

    def __init__(self, model: "PeftModel", head: Head | None, samples: Sequence[Sample]) -> None:
        self._head = head
        self._packs = [pack(some) for some in passes([(one,) for one in samples], AT_ONCE)]
        self._base = self._states(model)

    def drift(self, model: "PeftModel") -> Drift:
        """How far the model has moved."""
        kl, same, count = 0.0, 0, 0
        for base, tuned in zip(self._base, self._states(model), strict=True):
            for pair in zip(torch.split(base, ROWS), torch.split(tuned, ROWS), strict=True):
                p, q = (self._log_probabilities(states) for states in pair)
                kl += float((p.exp() * (p - q)).sum())
                same += int((p.argmax(-1) == q.argmax(-1)).sum())
                count += len(p)
        return Drift(max(0.0, kl / count), same / count)

    def _states(self, model: "PeftModel") -> list[Tensor]:
        model.eval()
        base = model.get_base_model()

        def states(packed: Pack) -> Tensor:
            return said_states(model, packed, self._head)

        with torch.no_grad(), arithmetic(base), uncompiled(base):
            return [states(packed) for packed in self._packs]

    def _log_probabilities(self, states: Tensor) -> Tensor:
        """Of the next token, (rows, vocab_size)."""
        head = self._head
        if head is not None:
            buffers = head.new_buffers(len(states))
            states = head.logits(states.to(head.weight.dtype), buffers)
        exact = torch.float64 if states.dtype == torch.float64 else torch.float32
        return states.log_softmax(-1, dtype=exact)
