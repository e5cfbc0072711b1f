"""LoRA's forward and backward as operators that a compiled layer calls and does not look into.

A compiler would make each in-place sum a copy first. The function is that of `LoraProduct`, its
scale within b; the MLP's three products are one operator, since between them LoRA's part can be
had for nothing. Frozen weights are bf16; fp8 with the scales and the turned values of a `Stack`; or
in 4 bits, with their `quant_state` for the scales, and unpacked within an operator.
"""

from typing import Any

import torch
from torch import Tensor

from tunesmith.models.nf4 import unpacked
from tunesmith.training.kernels.float8 import add_low_rank_, product, product_back
from tunesmith.training.kernels.operators import operator
from tunesmith.training.kernels.swiglu import swiglu, swiglu_backward


def _lora(
    rows: Tensor, weight: Tensor, row_scale: Tensor | None, bias: Tensor | None, a: Tensor,
    b: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return rows Wᵀ + (rows aᵀ) bᵀ + bias, (M, out), and rows aᵀ, (M, r)."""
    inner = rows @ a.T
    return _forward(rows, inner, b, bias, weight, row_scale), inner


def _lora_backward(
    of_y: Tensor, rows: Tensor, inner: Tensor, weight: Tensor, row_scale: Tensor | None,
    turned: Tensor | None, a: Tensor, b: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of rows, a and b."""
    of_inner = of_y @ b
    of_rows = _back(of_y, of_inner, a, weight, row_scale, turned)
    return of_rows, of_inner.T @ rows, of_y.T @ inner


def _lora_mlp(
    rows: Tensor, weights: list[Tensor], row_scales: list[Tensor], a: list[Tensor], b: list[Tensor],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """down(silu(gate(rows)) · up(rows)), each with its LoRA.

    The lists are of two: gate and up in one, N rows each, and down. Returns the output (M, out),
    gate and up without LoRA's part (M, 2 N) if to `keep`, else (0, 2 N), and what the two a make
    of their inputs, (M, r).
    """
    scale, scale_down = row_scales or (None, None)
    inner = rows @ a[0].T
    wide = _product(rows, weights[0], scale)
    act = swiglu(wide, inner, b[0])
    inner_down = act @ a[1].T
    output = _forward(act, inner_down, b[1], None, weights[1], scale_down)
    return output, wide if keep else wide.new_empty(0, wide.shape[1]), inner, inner_down


def _lora_mlp_backward(
    of_y: Tensor, rows: Tensor, wide: Tensor, inner: Tensor, inner_down: Tensor,
    weights: list[Tensor], row_scales: list[Tensor], turned: list[Tensor], a: list[Tensor],
    b: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of rows, of the two a, and of the two b.

    A `wide` without rows is computed again.
    """
    scale, scale_down = row_scales or (None, None)
    back, back_down = turned or (None, None)
    of_inner_down = of_y @ b[1]
    of_act = _product_back(of_y, weights[1], scale_down, back_down)
    wide = wide if len(wide) else _product(rows, weights[0], scale)
    of_wide, act = swiglu_backward(of_act, of_inner_down, a[1], wide, inner, b[0])
    of_a_down = of_inner_down.T @ act
    del act, of_act, wide
    of_inner = of_wide @ b[0]
    of_rows = _back(of_wide, of_inner, a[0], weights[0], scale, back)
    return of_rows, of_inner.T @ rows, of_a_down, of_wide.T @ inner, of_y.T @ inner_down


class LoraLinear(torch.autograd.Function):
    """`lora` with its gradients; x (…, in), and `row_scale` and `turned` if the weight is fp8."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, row_scale: Tensor | None, turned: Tensor | None,
        bias: Tensor | None, a: Tensor, b: Tensor,
    ) -> Tensor:  # fmt: skip
        """Return (…, out)."""
        rows = x.reshape(-1, x.shape[-1])
        y, inner = lora(rows, weight, row_scale, bias, a, b)
        ctx.save_for_backward(rows, inner, weight, row_scale, turned, a, b)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, a and b."""
        rows, inner, weight, row_scale, turned, a, b = ctx.saved_tensors
        (gradient,) = gradients
        of_y = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        of_rows, of_a, of_b = lora_backward(of_y, rows, inner, weight, row_scale, turned, a, b)
        return of_rows.view(*gradient.shape[:-1], -1), None, None, None, None, of_a, of_b


class LoraMlp(torch.autograd.Function):
    """`lora_mlp` with its gradients, gate and up kept for backward or computed again there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: bool, frozen: int, *tensors: Tensor) -> Tensor:
        """Return (…, out); `tensors` are the frozen ones, two a and two b.

        The `frozen` frozen ones are the two weights, their scales, and them turned.
        """
        rows = x.reshape(-1, x.shape[-1])
        fixed, low = list(tensors[:frozen]), list(tensors[frozen:])
        y, *kept = lora_mlp(rows, fixed[:2], fixed[2:4], low[:2], low[2:], keep)
        ctx.save_for_backward(rows, *kept, *tensors)
        ctx.frozen = frozen
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of the two a, and of the two b."""
        rows, wide, inner, inner_down, *tensors = ctx.saved_tensors
        fixed, low = tensors[: ctx.frozen], tensors[ctx.frozen :]
        (gradient,) = gradients
        of_y = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        of_rows, *of_low = lora_mlp_backward(
            of_y, rows, wide, inner, inner_down, fixed[:2], fixed[2:4], fixed[4:], low[:2], low[2:]
        )
        of_x = of_rows.view(*gradient.shape[:-1], -1)
        return of_x, None, None, *(None,) * ctx.frozen, *of_low


def _forward(
    rows: Tensor, inner: Tensor, b: Tensor, bias: Tensor | None, weight: Tensor,
    row_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """rows · weightᵀ + inner · bᵀ + bias.

    In bf16 LoRA's part is formed first and the sum rounded once, so that a small one is not lost.
    """
    weight, row_scale = _whole(weight, row_scale)
    if row_scale is not None:
        return add_low_rank_(product(rows, weight, row_scale), inner, b, bias)
    low = inner @ b.T if bias is None else torch.addmm(bias, inner, b.T)
    return low.addmm_(rows, weight.T)


def _back(
    of_y: Tensor, of_inner: Tensor, a: Tensor, weight: Tensor, row_scale: Tensor | None,
    turned: Tensor | None,
) -> Tensor:  # fmt: skip
    """of_y · weight + of_inner · a."""
    weight, row_scale = _whole(weight, row_scale)
    if row_scale is None or turned is None:
        return (of_inner @ a).addmm_(of_y, weight)
    return add_low_rank_(product_back(of_y, turned, row_scale), of_inner, a.T, None)


def _product(rows: Tensor, weight: Tensor, row_scale: Tensor | None) -> Tensor:
    """rows · weightᵀ."""
    weight, row_scale = _whole(weight, row_scale)
    return rows @ weight.T if row_scale is None else product(rows, weight, row_scale)


def _product_back(
    of_y: Tensor, weight: Tensor, row_scale: Tensor | None, turned: Tensor | None
) -> Tensor:
    """of_y · weight."""
    weight, row_scale = _whole(weight, row_scale)
    if row_scale is None or turned is None:
        return of_y @ weight
    return product_back(of_y, turned, row_scale)


def _whole(weight: Tensor, row_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A weight in 4 bits in bf16, without a scale; others as they are."""
    if weight.dtype != torch.uint8 or row_scale is None:
        return weight, row_scale
    return unpacked(weight, row_scale, torch.bfloat16), None


def _lora_shapes(rows: Tensor, weight: Any, row_scale: Any, bias: Any, a: Tensor, b: Tensor) -> Any:
    return rows.new_empty(rows.shape[0], b.shape[0]), rows.new_empty(rows.shape[0], a.shape[0])


def _lora_backward_shapes(of_y: Any, rows: Tensor, inner: Any, weight: Any, row_scale: Any,
                          turned: Any, a: Tensor, b: Tensor) -> Any:  # fmt: skip
    return torch.empty_like(rows), torch.empty_like(a), torch.empty_like(b)


def _lora_mlp_shapes(
    rows: Tensor, weights: Any, row_scales: Any, a: Any, b: Any, keep: bool
) -> Any:
    # Not len(), which would tie the compiled layer to one length of pack.
    count = rows.shape[0]
    of_each = ((count, b[1]), (count if keep else 0, b[0]), (count, a[0]), (count, a[1]))
    return tuple(rows.new_empty(length, low.shape[0]) for length, low in of_each)


def _lora_mlp_backward_shapes(of_y: Any, rows: Tensor, wide: Any, inner: Any, inner_down: Any,
                              weights: Any, row_scales: Any, turned: Any, a: Any,
                              b: Any) -> Any:  # fmt: skip
    return torch.empty_like(rows), *(torch.empty_like(one) for one in (*a, *b))


lora = operator(_lora, _lora_shapes)
lora_backward = operator(_lora_backward, _lora_backward_shapes)
lora_mlp = operator(_lora_mlp, _lora_mlp_shapes)
lora_mlp_backward = operator(_lora_mlp_backward, _lora_mlp_backward_shapes)
