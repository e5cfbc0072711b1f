"""Attention of a tile in bf16 on a CPU, as whole matrix products.

PyTorch's own kernel multiplies blocks of 64 by 64 there, which reaches a sixth of what a processor
with bf16 products can do. Scores are formed and normalised in float32, as that kernel does.
"""

import math
from typing import Any

import torch
from torch import Tensor

BLOCK = 512  # queries at a time, so that few keys are read that none of them may see
KEPT = 2**18  # scores of a head that are kept for backward; where there are more, none is


class TileAttention(torch.autograd.Function):
    """Shapes: q (N, H, L, d), k and v (N, H_kv, S, d), mask (N, 1, L, S), added to scores.

    Query l of a lone segment sees no key beyond S - L + l; where N is more, L is at most `BLOCK`.
    H is a multiple of H_kv; each key head serves as many query heads in a row. The mask is float32,
    and so is `scratch`, to work in, `scratch_size` or more: memory that is new costs a CPU more
    than the product that is written there.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, scratch: Tensor
    ) -> Tensor:
        """Return (N, H, L, d)."""
        heads, keys, values = _grouped(q, k), k.flatten(0, 1), v.flatten(0, 1)
        weights = []
        outputs = []
        for start, stop, seen in _blocks(mask):
            queries = heads[:, :, start:stop].flatten(1, 2)
            shown = mask[:, :, start:stop, :seen]
            weights.append(_weights(queries, keys[:, :seen], shown, scale, scratch))
            output = weights[-1] @ values[:, :seen]
            outputs.append(output.view(len(keys), -1, stop - start, output.shape[-1]))
        kept = weights if mask.numel() <= KEPT else []
        ctx.save_for_backward(q, k, v, mask, *kept)
        ctx.scale, ctx.scratch = scale, scratch
        return torch.cat(outputs, 2).view(q.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, mask, *kept = ctx.saved_tensors
        heads, keys, values = _grouped(q, k), k.flatten(0, 1), v.flatten(0, 1)
        of_output = _grouped(gradients[0], k)
        of_k, of_v, of_q = torch.zeros_like(keys), torch.zeros_like(values), []
        for index, (start, stop, seen) in enumerate(_blocks(mask)):
            queries = heads[:, :, start:stop].flatten(1, 2)
            gradient = of_output[:, :, start:stop].flatten(1, 2)
            if kept:
                weights = kept[index]
            else:
                shown = mask[:, :, start:stop, :seen]
                weights = _weights(queries, keys[:, :seen], shown, ctx.scale, ctx.scratch)
            of_v[:, :seen].baddbmm_(weights.mT, gradient)
            of_weights = gradient @ values[:, :seen].mT
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_k[:, :seen].baddbmm_(of_scores.mT, queries)
            of_queries = (of_scores @ keys[:, :seen]).mul_(ctx.scale)
            of_q.append(of_queries.view(len(keys), -1, stop - start, of_queries.shape[-1]))
        of_k, of_v = of_k.mul_(ctx.scale).view(k.shape), of_v.view(v.shape)
        return torch.cat(of_q, 2).view(q.shape), of_k, of_v, None, None, None


def scratch_size(q: Tensor, k: Tensor) -> int:
    """How many float32 `TileAttention` works in."""
    return len(q) * q.shape[1] * min(q.shape[2], BLOCK) * k.shape[2]


def _weights(queries: Tensor, keys: Tensor, mask: Tensor, scale: float, scratch: Tensor) -> Tensor:
    """How much of each key every query takes, (N·H_kv, G·L, S) in the type of the queries."""
    shape = (len(keys), queries.shape[1], keys.shape[1])
    scores = scratch[: math.prod(shape)].view(shape)
    with torch.autocast("cpu", enabled=False):
        torch.bmm(queries.float() * scale, keys.float().mT, out=scores)
    scores.view(len(mask), -1, *mask.shape[2:]).add_(mask)
    return torch.softmax(scores, -1, out=scores).to(queries.dtype)


def _grouped(heads: Tensor, keys: Tensor) -> Tensor:
    """(N, H, L, d) as (N·H_kv, G, L, d)."""
    return heads.reshape(len(keys) * keys.shape[1], -1, *heads.shape[2:])


def _blocks(mask: Tensor) -> list[tuple[int, int, int]]:
    """Where blocks of queries start and stop, and how many keys the last of each sees."""
    queries, keys = mask.shape[2:]
    starts = range(0, queries, BLOCK)
    stops = [min(start + BLOCK, queries) for start in starts]
    return [(*ends, keys - queries + ends[1]) for ends in zip(starts, stops, strict=True)]
