"""LoRA's forward and backward as one function: y = x Wᵀ + s (x Aᵀ) Bᵀ, dropout before Aᵀ.

PEFT's own forward is the same function in five operations, each of which writes a whole
activation and keeps its inputs for backward. Here only x and x Aᵀ are kept, and the frozen W gets
no gradient. The parameters stay PEFT's.

LoRA's part is formed first and the wide product added into it. The other way round, in bf16, most
of what LoRA has learnt in its first steps would be lost: less than half the last bit of x Wᵀ.
"""

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from tunesmith.models import nf4
from tunesmith.models.nf4 import Nf4Linear
from tunesmith.training.dropout import kept
from tunesmith.training.widened import WideLinear

if TYPE_CHECKING:
    from peft import PeftModel


def fuse_lora(model: "PeftModel") -> None:
    """Make every plain LoRA layer of the model a `FusedLinear`.

    Layers with DoRA, a bias of their own, or a base that is neither a plain `nn.Linear` nor one
    in 4 bits keep PEFT's forward.
    """
    for module in model.modules():
        if type(module) is Linear and _is_plain(module):
            module.__class__ = FusedLinear


class FusedLinear(Linear):  # type: ignore[misc]  # PEFT is not typed
    """PEFT's LoRA layer, computed by `LoraProduct` wherever its one adapter is on."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return (…, out) for x (…, in)."""
        output: Tensor
        if args or kwargs or self.disable_adapters or self.merged:
            output = super().forward(x, *args, **kwargs)
        else:
            (name,) = self.lora_A
            base, a, b = self.base_layer, self.lora_A[name], self.lora_B[name]
            wide = type(base) is WideLinear
            x = x.float() if wide else x.to(getattr(base, "dtype", base.weight.dtype))
            mask, scale = None, self.scaling[name]
            rate = getattr(self.lora_dropout[name], "p", 0.0)
            if self.training and rate:
                mask, scale = kept(x, rate), scale / (1 - rate)
            output = LoraProduct.apply(  # type: ignore[no-untyped-call]
                x, base.weight, base.bias, a.weight, b.weight, scale, mask,
                getattr(base, "quant_state", None),
            )  # fmt: skip
        return output


class LoraProduct(torch.autograd.Function):
    """Shapes: x (…, in), weight (out, in), bias (out,) or None, a (r, in), b (out, r).

    The mask, of x's shape, says what dropout keeps of x before A; None keeps all. A weight in
    4 bits comes with the `quant_state` of its `Nf4Linear`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        mask: Tensor | None = None,
        quant_state: Tensor | None = None,
    ) -> Tensor:
        """Return (…, out), in the type of x."""
        rows = x.reshape(-1, x.shape[-1])
        mask = None if mask is None else mask.view(rows.shape)
        a, b = a.to(rows.dtype), b.to(rows.dtype)
        inner = _masked(rows, mask) @ a.T
        ctx.save_for_backward(rows, inner, weight, a, b, mask, quant_state)
        ctx.scale = scale
        y = inner * scale @ b.T
        if quant_state is None:
            y.addmm_(rows, weight.to(rows.dtype).T)
        else:
            y = nf4.product(rows, y, weight, quant_state)
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, a and b; autograd turns those of a and b into their own type."""
        rows, inner, weight, a, b, mask, quant_state = ctx.saved_tensors
        (gradient,) = gradients
        of_y = gradient.reshape(-1, gradient.shape[-1])
        of_inner = (of_y @ b).mul_(ctx.scale)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = _masked(of_inner @ a, mask)
            if quant_state is None:
                of_x.addmm_(of_y, weight.to(of_y.dtype))
            else:
                of_x = nf4.product_back(of_y, of_x, weight, quant_state)
            of_x = of_x.view(*gradient.shape[:-1], -1)
        return (
            of_x,
            None,
            None,
            of_inner.T @ _masked(rows, mask),
            # As of_y.T @ inner it would take a CPU ten times as long: the wide one is turned.
            (inner.T @ of_y).mul_(ctx.scale).T,
            None,
            None,
            None,
        )


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    # Not x * mask: with unlike types a CPU multiplies one entry at a time.
    return x if mask is None else mask.to(x.dtype).mul_(x)


def _is_plain(layer: Any) -> bool:
    (name,) = layer.lora_A
    return type(layer.base_layer) in (nn.Linear, Nf4Linear) and not (
        name in layer.lora_variant or layer.lora_bias[name] or layer.fan_in_fan_out
    )
