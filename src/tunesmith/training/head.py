"""The model's head and its loss in one function, a few rows at a time.

Logits are wide: one row of a large vocabulary is as long as forty hidden states. So a chunk of
rows is projected, its loss and its gradient are formed, and the logits are dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # of float32 logits at once
COPIES = 3  # of a chunk's logits, in float32, where they are not all formed in place


@dataclass(frozen=True)
class Targets:
    """What shall be said at each row, sorted by row.

    Attributes:
        row: Which row, (T,).
        token: The id to be said, (T,); those of a row are different ones.
        weight: How much it counts, (T,), in the type the loss is summed in.
        rest: How much it counts that none of the row's targets is said, (rows,); None if nowhere.
        starts: Where each row's targets begin and the last's end, (rows + 1,), on the CPU.
    """

    row: Tensor
    token: Tensor
    weight: Tensor
    rest: Tensor | None
    starts: tuple[int, ...]

    @property
    def place(self) -> tuple[Tensor, Tensor]:
        """Where they lie in the rows' logits."""
        return self.row, self.token

    def of_rows(self, values: Tensor) -> Tensor:
        """The sum over each row's targets of what they have, (rows,)."""
        return values.new_zeros(len(self.starts) - 1).index_add_(0, self.row, values)

    @property
    def every(self) -> Tensor:
        """How much each row counts, (rows,)."""
        named = self.of_rows(self.weight)
        return named if self.rest is None else named + self.rest

    def left(self, shares: Tensor) -> Tensor:
        """The probability of what is no target, (rows,), given the targets' own, (T,)."""
        return (1 - self.of_rows(shares)).clamp(min=torch.finfo(shares.dtype).eps)

    def between(self, start: int, stop: int) -> "Targets":
        """Those of some rows, counted from the first of them."""
        first, last = self.starts[start], self.starts[stop]
        return Targets(
            self.row[first:last] - start,
            self.token[first:last],
            self.weight[first:last],
            None if self.rest is None else self.rest[start:stop],
            tuple(at - first for at in self.starts[start : stop + 1]),
        )


@dataclass(frozen=True)
class Head:
    """Logits = cap · tanh(scale · h Wᵀ / cap), or without the cap where that is None.

    `bias` is added before scaling.
    """

    weight: Tensor  # (vocab_size, D)
    bias: Tensor | None
    scale: float
    cap: float | None

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "Head | None":
        """The head of a causal language model; None if it is trained, or not a plain product."""
        whole: Any = model
        layer = whole.get_output_embeddings()
        if type(layer) is not nn.Linear or layer.weight.requires_grad:
            return None
        config = whole.config
        divided = getattr(config, "logits_scaling", None)
        scale = getattr(config, "logit_scale", None) or (1 / divided if divided else 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return cls(layer.weight, layer.bias, float(scale), cap)

    @cached_property
    def buffers(self) -> "Buffers":
        """A chunk's; kept on a CPU, to which new memory costs more than what is summed in it."""
        return self.new_buffers(self.at_once)

    def new_buffers(self, rows: int) -> "Buffers":
        """Memory for the logits of so many rows."""
        narrow = self.weight.new_empty(rows, self.weight.shape[0])
        if narrow.dtype in (torch.float32, torch.float64):
            return narrow, narrow
        return narrow, torch.empty_like(narrow, dtype=torch.float32)

    @property
    def at_once(self) -> int:
        """Rows whose logits fit beside one another."""
        budget = CHUNK_BYTES.get(self.weight.device.type, CHUNK_BYTES["cpu"])
        return max(1, budget // (4 * self.weight.shape[0]))

    @property
    def working_bytes(self) -> int:
        """Bytes that a chunk works with: its logits, and copies unless a kernel needs none."""
        logits = self.at_once * self.weight.shape[0]
        return logits * (self.weight.itemsize if _kernel_fits(self, self.weight) else 4 * COPIES)

    def loss(self, hidden: Tensor, targets: Targets) -> Tensor:
        """Sum over what is to be said of weight × negative log likelihood, a scalar.

        `hidden` has shape (rows, D).
        """
        loss: Tensor = HeadLoss.apply(hidden, self, targets)  # type: ignore[no-untyped-call]
        return loss

    def logits(self, hidden: Tensor, buffers: "Buffers") -> Tensor:
        """Of a few rows, (rows, vocab_size), in float32 or finer: the second buffer."""
        narrow, logits = (buffer[: len(hidden)] for buffer in buffers)
        torch.mm(hidden, self.weight.T, out=narrow)
        if logits.dtype != narrow.dtype:
            logits.copy_(narrow)
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1:
            logits *= self.scale
        if self.cap is not None:
            logits = logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def chunks(self, rows: int) -> list[tuple[int, int]]:
        """Ranges of that many rows."""
        starts = range(0, rows, self.at_once)
        return [(start, min(start + self.at_once, rows)) for start in starts]


Buffers = tuple[Tensor, Tensor]
"""A chunk's logits as the head multiplies them, and in float32 or finer; one tensor if the same."""


class HeadLoss(torch.autograd.Function):
    """Forms the gradient of the hidden states at once, since the logits will be gone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, targets: Targets) -> Tensor:
        """The loss, in float32 or finer; `hidden` (rows, D)."""
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        x = hidden.detach().to(head.weight.dtype)
        gradient = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=exact, device=hidden.device)
        if _kernel_fits(head, x):
            chunk = _kernel_chunk
        else:
            buffers = head.new_buffers(min(len(x), head.at_once)) if x.is_cuda else head.buffers
            chunk = partial(_chunk, buffers)
        for start, stop in head.chunks(len(x)):
            loss, of_logits = chunk(head, x[start:stop], targets.between(start, stop))
            total += loss
            if gradient is not None:
                torch.mm(of_logits(), head.weight, out=gradient[start:stop])
            del of_logits  # it holds the chunk's logits
        ctx.gradient = gradient
        ctx.dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        """The gradient of the hidden states, scaled by that of the loss."""
        (outer,) = gradients
        return (ctx.gradient * outer).to(ctx.dtype), None, None


def _chunk(
    buffers: Buffers, head: Head, x: Tensor, said: Targets
) -> tuple[Tensor, Callable[[], Tensor]]:
    """The loss of a few rows, and how to get the gradient of their logits, in x's type.

    With p the softmax, w the weights of a row's targets, r that of the rest and e their sum, the
    gradient is e p - w at a target, and elsewhere (e - r / (1 - sum of the targets' p)) p.
    """
    logits = head.logits(x, buffers)
    chosen = (logits[said.place] * said.weight).sum()
    slope = None if head.cap is None else 1 - (logits / head.cap) ** 2
    highest = logits.amax(-1, keepdim=True)
    powers = logits.sub_(highest).exp_()
    normaliser = powers.sum(-1, keepdim=True)
    loss = ((normaliser.log() + highest)[:, 0] * said.of_rows(said.weight)).sum() - chosen
    factor, at_targets = said.every, -said.weight
    if said.rest is not None:
        shares = powers[said.place] / normaliser[said.row, 0]
        left = said.left(shares)
        loss -= (said.rest * left.log()).sum()
        factor = factor - said.rest / left
        at_targets = at_targets + shares * (said.rest / left)[said.row]

    def gradient() -> Tensor:
        of_logits = powers.mul_(factor[:, None] / normaliser)
        of_logits.index_put_(said.place, at_targets, accumulate=True)
        if slope is not None:
            of_logits *= slope
        if head.scale != 1:
            of_logits *= head.scale
        narrow = buffers[0][: len(x)]
        return of_logits if of_logits.dtype == narrow.dtype else narrow.copy_(of_logits)

    return loss, gradient


def _kernel_chunk(head: Head, x: Tensor, said: Targets) -> tuple[Tensor, Callable[[], Tensor]]:
    """`_chunk` in one kernel over the logits, which stay in bf16; no token twice in a row."""
    from tunesmith.training.kernels.softmax import softmax_

    every = said.every
    logits = x @ head.weight.T
    chosen = logits[said.place].float() * head.scale
    normaliser = softmax_(logits, every, head.scale)
    shares = (chosen - normaliser[said.row]).exp()
    loss = (normaliser * said.of_rows(said.weight)).sum() - (chosen * said.weight).sum()
    if said.rest is not None:
        left = said.left(shares)
        loss -= (said.rest * left.log()).sum()
        logits *= (1 - said.rest / (left * every))[:, None]

    def gradient() -> Tensor:
        # From float32: p - 1 in bf16 would lose what is left to learn.
        at_targets = head.scale * (shares * every[said.row] - said.weight)
        return logits.index_put_(said.place, at_targets.to(logits.dtype))

    return loss, gradient


def _kernel_fits(head: Head, x: Tensor) -> bool:
    plain = head.cap is None and head.bias is None
    return plain and x.is_cuda and x.dtype == torch.bfloat16 and find_spec("triton") is not None
