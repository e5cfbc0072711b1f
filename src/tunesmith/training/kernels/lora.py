"""LoRA's forward and backward as operators that a compiled layer calls and does not look into.

A compiler would make each in-place sum a copy first. The function is that of `LoraProduct`; the
MLP's three products are one operator, since between them LoRA's part can be had for nothing.
They are registered by hand: what `custom_op` checks at each call takes longer than the call.
Frozen weights are bf16, or fp8 with the scales and the turned values of `Float8Linear`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tunesmith.training.kernels.float8 import product, product_back
from tunesmith.training.kernels.swiglu import swiglu, swiglu_backward


def _lora(
    rows: Tensor, weight: Tensor, row_scale: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return rows Wᵀ + scale (rows aᵀ) bᵀ, (M, out), and rows aᵀ, (M, r)."""
    inner = rows @ a.T
    low = inner * scale @ b.T
    return _forward(rows, low, weight, row_scale), inner


def _lora_backward(
    of_y: Tensor, rows: Tensor, inner: Tensor, weight: Tensor, row_scale: Tensor | None,
    turned: Tensor | None, a: Tensor, b: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of rows, a and b."""
    of_inner = (of_y @ b).mul_(scale)
    of_rows = _back(of_y, of_inner @ a, weight, row_scale, turned)
    return of_rows, of_inner.T @ rows, (of_y.T @ inner).mul_(scale)


def _lora_mlp(
    rows: Tensor, weights: list[Tensor], row_scales: list[Tensor], a: list[Tensor],
    b: list[Tensor], scales: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """down(silu(gate(rows)) · up(rows)), each with its LoRA; the three are listed in that order.

    Returns the output (M, out), gate and up without LoRA's part (M, N), and what A makes of the
    three inputs, (M, r) each.
    """
    inner = [rows @ a[0].T, rows @ a[1].T]
    factors: list[Tensor | None] = list(row_scales) if row_scales else [None] * 3
    wide = list(zip(weights, factors, strict=True))
    gate, up = (_forward(rows, None, *wide[place]) for place in (0, 1))
    act = swiglu(gate, up, (inner[0], inner[1]), (b[0], b[1]), (scales[0], scales[1]))
    inner.append(act @ a[2].T)
    output = _forward(act, inner[2] * scales[2] @ b[2].T, *wide[2])
    return output, gate, up, inner[0], inner[1], inner[2]


def _lora_mlp_backward(
    of_y: Tensor, rows: Tensor, gate: Tensor, up: Tensor, inner: list[Tensor],
    weights: list[Tensor], row_scales: list[Tensor], turned: list[Tensor], a: list[Tensor],
    b: list[Tensor], scales: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of rows, of the three a, and of the three b."""
    of_inner = (of_y @ b[2]).mul_(scales[2])
    of_act = product_back(of_y, turned[2], row_scales[2]) if row_scales else of_y @ weights[2]
    of_gate, of_up, act = swiglu_backward(
        of_act, of_inner, a[2], gate, up, (inner[0], inner[1]), (b[0], b[1]),
        (scales[0], scales[1]),
    )  # fmt: skip
    of_b_down = (of_y.T @ inner[2]).mul_(scales[2])
    of_a_down = of_inner.T @ act
    del act, of_act
    lows = [(of_gate @ b[0]).mul_(scales[0]), (of_up @ b[1]).mul_(scales[1])]
    of_rows = torch.cat(lows, 1) @ torch.cat([a[0], a[1]])
    for place, wide in enumerate((of_gate, of_up)):
        scale, back = (row_scales[place], turned[place]) if row_scales else (None, None)
        of_rows = _back(wide, of_rows, weights[place], scale, back)
    return (
        of_rows, lows[0].T @ rows, lows[1].T @ rows, of_a_down,
        (of_gate.T @ inner[0]).mul_(scales[0]), (of_up.T @ inner[1]).mul_(scales[1]), of_b_down,
    )  # fmt: skip


class LoraLinear(torch.autograd.Function):
    """`lora` with its gradients; x (…, in), and `row_scale` and `turned` if the weight is fp8."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, row_scale: Tensor | None, turned: Tensor | None,
        bias: Tensor | None, a: Tensor, b: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        """Return (…, out)."""
        rows = x.reshape(-1, x.shape[-1])
        a, b = a.to(rows.dtype), b.to(rows.dtype)
        y, inner = lora(rows, weight, row_scale, a, b, scale)
        ctx.save_for_backward(rows, inner, weight, row_scale, turned, a, b)
        ctx.scale = scale
        if bias is not None:
            y = y + bias
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, a and b."""
        rows, inner, weight, row_scale, turned, a, b = ctx.saved_tensors
        (gradient,) = gradients
        of_y = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        of_rows, of_a, of_b = lora_backward(
            of_y, rows, inner, weight, row_scale, turned, a, b, ctx.scale
        )
        of_x = of_rows.view(*gradient.shape[:-1], -1)
        return of_x, None, None, None, None, of_a, of_b, None


class LoraMlp(torch.autograd.Function):
    """`lora_mlp` with its gradients; `frozen` is three weights, their scales, and them turned."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: tuple[float, ...], frozen: int, *tensors: Tensor
    ) -> Tensor:
        """Return (…, out); `tensors` are `frozen` frozen ones, three a and three b."""
        rows = x.reshape(-1, x.shape[-1])
        fixed, low = list(tensors[:frozen]), [one.to(rows.dtype) for one in tensors[frozen:]]
        y, *kept = lora_mlp(rows, fixed[:3], fixed[3:6], low[:3], low[3:], list(scales))
        ctx.save_for_backward(rows, *kept, *fixed, *low)
        ctx.scales, ctx.frozen = scales, frozen
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of the three a, and of the three b."""
        rows, gate, up, *rest = ctx.saved_tensors
        inner, fixed, low = rest[:3], rest[3 : 3 + ctx.frozen], rest[3 + ctx.frozen :]
        (gradient,) = gradients
        of_y = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        of_rows, *of_low = lora_mlp_backward(
            of_y, rows, gate, up, inner, fixed[:3], fixed[3:6], fixed[6:], low[:3], low[3:],
            list(ctx.scales),
        )  # fmt: skip
        of_x = of_rows.view(*gradient.shape[:-1], -1)
        return of_x, None, None, *(None,) * ctx.frozen, *of_low


def _forward(
    rows: Tensor, start: Tensor | None, weight: Tensor, row_scale: Tensor | None
) -> Tensor:
    """start + rows · weightᵀ, in place of `start` where there is one.

    In bf16 the sum is rounded once, so that a small `start` is not lost; in fp8 it is twice.
    """
    if row_scale is not None:
        found = product(rows, weight, row_scale)
        return found if start is None else start.add_(found)
    return rows @ weight.T if start is None else start.addmm_(rows, weight.T)


def _back(
    of_y: Tensor, start: Tensor, weight: Tensor, row_scale: Tensor | None, turned: Tensor | None
) -> Tensor:
    """start + of_y · weight, in place of `start`."""
    if row_scale is None or turned is None:
        return start.addmm_(of_y, weight)
    return start.add_(product_back(of_y, turned, row_scale))


def _lora_shapes(
    rows: Tensor, weight: Tensor, row_scale: Any, a: Tensor, b: Tensor, scale: float
) -> Any:
    return rows.new_empty(rows.shape[0], b.shape[0]), rows.new_empty(rows.shape[0], a.shape[0])


def _lora_backward_shapes(of_y: Tensor, rows: Tensor, inner: Any, weight: Any, row_scale: Any,
                          turned: Any, a: Tensor, b: Tensor, scale: float) -> Any:  # fmt: skip
    return torch.empty_like(rows), torch.empty_like(a), torch.empty_like(b)


def _lora_mlp_shapes(
    rows: Tensor, weights: Any, row_scales: Any, a: Any, b: Any, scales: Any
) -> Any:
    # Not len(), which would tie the compiled layer to one length of pack.
    sizes = [one.shape[0] for one in (b[2], b[0], b[1], *a)]
    return tuple(rows.new_empty(rows.shape[0], size) for size in sizes)


def _lora_mlp_backward_shapes(of_y: Tensor, rows: Tensor, gate: Any, up: Any, inner: Any,
                              weights: Any, row_scales: Any, turned: Any, a: Any, b: Any,
                              scales: Any) -> Any:  # fmt: skip
    return torch.empty_like(rows), *(torch.empty_like(one) for one in (*a, *b))


_LIBRARY = torch.library.Library("tunesmith", "FRAGMENT")


def _operator(plain: Callable[..., Any], shapes: Callable[..., Any]) -> Callable[..., Any]:
    """Register a function of tensors that makes new ones; its schema is read off its signature."""
    name = plain.__name__.removeprefix("_")
    _LIBRARY.define(name + torch.library.infer_schema(plain, mutates_args=()))
    _LIBRARY.impl(name, plain, "CUDA")
    torch.library.register_fake(f"tunesmith::{name}", shapes, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.tunesmith, name).default
    return operator


lora = _operator(_lora, _lora_shapes)
lora_backward = _operator(_lora_backward, _lora_backward_shapes)
lora_mlp = _operator(_lora_mlp, _lora_mlp_shapes)
lora_mlp_backward = _operator(_lora_mlp_backward, _lora_mlp_backward_shapes)
