"""The head's softmax in place: logits in, their gradient but for the targets out; Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 8192


def softmax_(logits: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Make each row of `logits` scale · weight · softmax(scale · row); returns their logsumexp.

    Shapes: logits (rows, vocab_size), weight (rows,) float32; returns (rows,) float32.
    """
    rows, width = logits.shape
    normaliser = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _softmax[(rows,)](logits, weight, normaliser, scale, WIDTH=width, COLUMNS=COLUMNS, num_warps=16)
    return normaliser


@triton.jit
def _softmax(logits, weight, normaliser, scale, WIDTH: tl.constexpr,
             COLUMNS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    begin = logits + row * WIDTH
    columns = tl.arange(0, COLUMNS)
    # Each lane keeps its own maximum and sum; they meet once at the end.
    top = tl.full([COLUMNS], -1e30, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        inside = start + columns < WIDTH
        x = scale * tl.load(begin + start + columns, inside, -float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.where(inside, x, top))
        total = total * tl.exp(top - higher) + tl.where(inside, tl.exp(x - higher), 0.0)
        top = higher
    highest = tl.max(top, 0)
    whole = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    tl.store(normaliser + row, whole)
    factor = scale * tl.load(weight + row)
    for start in range(0, WIDTH, COLUMNS):
        inside = start + columns < WIDTH
        x = scale * tl.load(begin + start + columns, inside, 0.0).to(tl.float32)
        value = factor * tl.exp(x - whole)
        tl.store(begin + start + columns, value.to(logits.dtype.element_ty), inside)
