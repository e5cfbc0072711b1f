"""Frozen weights in bf16, arithmetic in float32: for a CPU whose bf16 products are the slower ones.

A layer's weight is widened just before a product and dropped behind it, which takes a hundredth
of the product's time. So weights take half the memory, all else is float32's, and nothing is
rounded on the way.
"""

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunesmith.models.nf4 import Nf4Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WideLinear(nn.Linear):
    """A frozen linear layer that widens its weight while it is used."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, out) in float32 for x (…, in)."""
        product: Tensor = WideProduct.apply(x.float(), self.weight)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias


class WideProduct(torch.autograd.Function):
    """x Wᵀ, which keeps the narrow weight for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Return (…, out), in the type of x (…, in)."""
        ctx.save_for_backward(weight)
        return x @ weight.to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of x."""
        (gradient,), (weight,) = gradients, ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None


def widen(model: "PreTrainedModel") -> None:
    """Let a model in bf16 compute in float32; only its linear layers stay in bf16, or in 4 bits.

    All else is float32 from here on: norms and biases are small, and the head and its embedding
    would be widened whole in every pass.
    """
    whole: Any = model
    head = whole.get_output_embeddings()
    for module in model.modules():
        if type(module) is nn.Linear and module is not head and not module.weight.requires_grad:
            module.__class__ = WideLinear
        if isinstance(module, Nf4Linear):
            module.dtype = torch.float32
        own: chain[Tensor] = chain(module.parameters(recurse=False), module.buffers(recurse=False))
        for tensor in own:
            narrow = type(module) is WideLinear and tensor is module.weight
            if not narrow and tensor.dtype == torch.bfloat16:
                tensor.data = tensor.data.float()
