"""Attention of segments as one operator, so that a layer is compiled whole around it.

cuDNN and flash attention are PyTorch's own; which of them runs is a matter of the pack, not of what
was compiled. No Triton is needed.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.training.kernels.operators import operator


@dataclass(frozen=True)
class Lengths:
    """A pack as kernels for variable lengths want it, on their device.

    Attributes:
        queries, keys: Where each segment's queries and its path's keys begin; int32 (S + 1,).
        gather: Which tokens are the keys, one path behind another; only read if `sizes` says so.
        sizes: The longest segment's queries and keys; whether all have one length, and a round one:
            cuDNN plans a second for a new length; whether keys are gathered. (4,), on the CPU.
    """

    queries: Tensor
    keys: Tensor
    gather: Tensor
    sizes: Tensor


def segments_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scale: float, window: int | None
) -> Tensor:
    """Attention of each segment over its path, causal from the bottom right; returns (1, U, H, d).

    Shapes: query (1, H, U, d), key and value (1, H_kv, U, d); in bf16 or fp16, on a GPU.
    """
    q, k, v = (one[0].transpose(0, 1) for one in (query, key, value))  # (U, heads, d)
    output: Tensor = _Attention.apply(
        q, k, v, lengths.queries, lengths.keys, lengths.gather, lengths.sizes, scale,
        -1 if window is None else window - 1,
    )  # fmt: skip
    return output[None]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        output, normaliser = attention(q, k, v, *rest)
        *lengths, ctx.scale, ctx.before = rest
        ctx.save_for_backward(q, k, v, output, normaliser, *lengths)
        found: Tensor = output
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_q, of_k, of_v = attention_backward(
            gradients[0].contiguous(), *ctx.saved_tensors, ctx.scale, ctx.before
        )
        return of_q, of_k, of_v, *(None,) * 6


def _attention(
    q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, gather: Tensor, sizes: Tensor,
    scale: float, before: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (U, H, d) and the logarithms of the softmax's sums, (H, U) in the kernel's own order.

    `before` is how many keys before its own a query sees; -1 for all.
    """
    longest_query, longest_key, alike, gathered = sizes.tolist()
    if alike and before < 0:
        found = torch.ops.aten._cudnn_attention_forward(
            *_batch(longest_query, q, k, v), None, None, None, longest_query, longest_query, True,
            0.0, True, False, scale=scale,
        )  # fmt: skip
        return _rows(found[0]), found[1].reshape(q.shape[1], -1)
    if gathered:
        k, v = k[gather], v[gather]
    output, normaliser, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, queries, keys, longest_query, longest_key, 0.0, True, False, scale=scale,
        window_size_left=before, window_size_right=0,
    )  # fmt: skip
    return output, normaliser


def _attention_backward(
    of_output: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, normaliser: Tensor,
    queries: Tensor, keys: Tensor, gather: Tensor, sizes: Tensor, scale: float, before: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v."""
    longest_query, longest_key, alike, gathered = sizes.tolist()
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # dropout's random state
    if alike and before < 0:
        batch = _batch(longest_query, of_output, q, k, v, output)
        logarithms = normaliser.view(-1, q.shape[1], longest_query, 1)
        found = torch.ops.aten._cudnn_attention_backward(
            *batch, logarithms, unused[0], unused[1], None, None, None, longest_query,
            longest_query, 0.0, True, scale=scale,
        )  # fmt: skip
        of_q, of_k, of_v = map(_rows, found)
        return of_q, of_k, of_v
    read = (k[gather], v[gather]) if gathered else (k, v)
    of_q, *of_read = torch.ops.aten._flash_attention_backward(
        of_output, q, *read, output, normaliser, queries, keys, longest_query, longest_key, 0.0,
        True, unused, unused[:0], scale=scale, window_size_left=before, window_size_right=0,
    )  # fmt: skip
    if gathered:
        of_read = [
            torch.zeros_like(k).index_put_((gather,), one, accumulate=True) for one in of_read
        ]
    of_k, of_v = of_read
    return of_q.contiguous(), of_k.contiguous(), of_v.contiguous()


def _batch(length: int, *rows: Tensor) -> list[Tensor]:
    """(U, heads, d) as (segments, heads, length, d)."""
    return [one.unflatten(0, (-1, length)).transpose(1, 2) for one in rows]


def _rows(batch: Tensor) -> Tensor:
    return batch.transpose(1, 2).flatten(0, 1).contiguous()


def _attention_shapes(q: Tensor, k: Any, v: Any, *_: Any) -> Any:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _attention_backward_shapes(of_output: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


attention = operator(_attention, _attention_shapes)
attention_backward = operator(_attention_backward, _attention_backward_shapes)
