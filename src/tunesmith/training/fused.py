"""LoRA's forward and backward as one function: y = x Wᵀ + s (x Aᵀ) Bᵀ.

PEFT's own forward is the same function in five operations, each of which writes a whole
activation and keeps its inputs for backward. Here only x and x Aᵀ are kept, the products add into
what is already there, and the frozen W gets no gradient. The parameters stay PEFT's.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel


def fuse_lora(model: "PeftModel") -> None:
    """Make every plain LoRA layer of the model a `FusedLinear`.

    Layers with dropout, DoRA, a bias of their own, or a base that is no plain `nn.Linear` keep
    PEFT's forward.
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
            x = x.to(base.weight.dtype)
            output = LoraProduct.apply(  # type: ignore[no-untyped-call]
                x, base.weight, base.bias, a.weight, b.weight, self.scaling[name]
            )
        return output


class LoraProduct(torch.autograd.Function):
    """Shapes: x (…, in), weight (out, in), bias (out,) or None, a (r, in), b (out, r)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        """Return (…, out), in the type of x."""
        rows = x.reshape(-1, x.shape[-1])
        a, b = a.to(rows.dtype), b.to(rows.dtype)
        inner = rows @ a.T
        ctx.save_for_backward(rows, inner, weight, a, b)
        ctx.scale = scale
        y = F.linear(rows, weight, bias).addmm_(inner, b.T, alpha=scale)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, a and b; autograd turns those of a and b into their own type."""
        rows, inner, weight, a, b = ctx.saved_tensors
        (gradient,) = gradients
        of_y = gradient.reshape(-1, gradient.shape[-1])
        of_inner = (of_y @ b).mul_(ctx.scale)
        of_x = (of_y @ weight).addmm_(of_inner, a) if ctx.needs_input_grad[0] else None
        return (
            None if of_x is None else of_x.view(*gradient.shape[:-1], -1),
            None,
            None,
            of_inner.T @ rows,
            # As of_y.T @ inner it would take a CPU ten times as long: the wide one is turned.
            (inner.T @ of_y).mul_(ctx.scale).T,
            None,
        )


def _is_plain(layer: Any) -> bool:
    (name,) = layer.lora_A
    has_dropout = not isinstance(layer.lora_dropout[name], nn.Identity)
    return type(layer.base_layer) is nn.Linear and not (
        has_dropout or name in layer.lora_variant or layer.lora_bias[name] or layer.fan_in_fan_out
    )
