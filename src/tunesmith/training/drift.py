"""How far tuning has moved a model from its base, where there was nothing to learn.

The base answers neutral questions that are never trained on, before the first step, and its
distribution over the next token is seen at each token of its answers. Later the tuned model reads
the same answers, and the two distributions are compared.

The tuned model reads them behind the system prompts it is trained with, and so does the base; but
where the base repeats the assistant's name from such a prompt, it reads them behind what is left
without the name. This is how replay asks it, too. There the two differ before anything is learnt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunesmith.data.packs import Pack, Sample, pack
from tunesmith.data.passes import passes
from tunesmith.training.compiled import uncompiled
from tunesmith.training.forward import arithmetic, said_states
from tunesmith.training.head import Head
from tunesmith.training.replay import Probed

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

    def __init__(self, model: "PeftModel", head: Head | None, asked: Sequence[Probed]) -> None:
        self._head = head
        unnamed = dict(asked)
        chunks = list(passes([(named,) for named in unnamed], AT_ONCE))
        self._packs = [pack(chunk) for chunk in chunks]
        self._base = self._states(model, [_beside(chunk, unnamed) for chunk in chunks])

    def drift(self, model: "PeftModel") -> Drift:
        """How far the model has moved."""
        kl, same, count = 0.0, 0, 0
        for base, tuned in zip(self._base, self._states(model, self._packs), strict=True):
            for pair in zip(torch.split(base, ROWS), torch.split(tuned, ROWS), strict=True):
                p, q = (self._log_probabilities(states) for states in pair)
                kl += float((p.exp() * (p - q)).sum())
                same += int((p.argmax(-1) == q.argmax(-1)).sum())
                count += len(p)
        return Drift(max(0.0, kl / count), same / count)

    def _states(self, model: "PeftModel", packs: Sequence[Pack]) -> list[Tensor]:
        model.eval()
        base = model.get_base_model()

        def states(packed: Pack) -> Tensor:
            return said_states(model, packed, self._head)

        with torch.no_grad(), arithmetic(base), uncompiled(base):
            return [states(packed) for packed in packs]

    def _log_probabilities(self, states: Tensor) -> Tensor:
        """Of the next token, (rows, vocab_size)."""
        head = self._head
        if head is not None:
            buffers = head.new_buffers(len(states))
            states = head.logits(states.to(head.weight.dtype), buffers)
        exact = torch.float64 if states.dtype == torch.float64 else torch.float32
        return states.log_softmax(-1, dtype=exact)


def _beside(named: Sequence[Sample], unnamed: Mapping[Sample, Sample]) -> Pack:
    """The other halves of a chunk, with their rows in the order of the chunk's own pack.

    That is the samples' order, since no two answers share a row: their questions differ.
    """
    ordered = sorted(named, key=lambda sample: sample.input_ids)
    others = [unnamed[sample] for sample in ordered]
    return pack(others, share=others == ordered)
