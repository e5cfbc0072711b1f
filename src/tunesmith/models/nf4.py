"""A frozen linear layer in 4 bits: NF4 with double quantisation, as QLoRA keeps a base.

bitsandbytes packs and unpacks. Each product unpacks its weight, forward and again backward, and
lets go of it, so that of all weights only one is whole at a time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64  # values that share a scale
OUTER = 256  # scales that share one of their own


class Nf4Linear(nn.Linear):
    """Takes the place of an `nn.Linear` that is not trained.

    Attributes:
        weight: Two values a byte, (out, in / 2) uint8.
        quant_state: The scales as bytes: in float32 the outer scales and, as often, what is added
            to each scale; then one byte for each block of values.
        dtype: Of the unpacked weight and of the products.
    """

    quant_state: Tensor

    def __init__(self, packed: Tensor, state: Any, bias: Any) -> None:
        out_features, in_features = state.shape
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.weight = nn.Parameter(packed.view(out_features, -1), requires_grad=False)
        self.bias = bias
        outer = torch.stack([state.state2.absmax, state.offset.expand_as(state.state2.absmax)])
        as_bytes = torch.cat([outer.flatten().view(torch.uint8), state.absmax])
        self.register_buffer("quant_state", as_bytes, persistent=False)
        self.dtype: torch.dtype = state.dtype

    @classmethod
    def of(cls, layer: nn.Linear) -> "Nf4Linear":
        """Pack the weight of a layer, where it is."""
        from bitsandbytes.functional import quantize_4bit

        weight = layer.weight.detach()
        packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        return cls(packed, state, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, out) in `dtype`."""
        rows = x.reshape(-1, x.shape[-1]).to(self.dtype)
        y: Tensor = Product.apply(rows, self.weight, self.quant_state)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], -1)


class Product(torch.autograd.Function):
    """rows · weightᵀ, which keeps nothing but the packed weight; rows (M, in)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, quant_state: Tensor) -> Tensor:
        """Return (M, out)."""
        ctx.save_for_backward(weight, quant_state)
        y: Tensor = product(rows, None, weight, quant_state)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the rows."""
        return product_back(gradients[0], None, *ctx.saved_tensors), None, None


# Operators, since a compiler that saw the weight unpacked twice would keep it between.
@torch.library.custom_op("tunesmith::nf4_product", mutates_args=())
def product(rows: Tensor, start: Tensor | None, weight: Tensor, quant_state: Tensor) -> Tensor:
    """start + rows · weightᵀ, (M, out); rows (M, in)."""
    whole = unpacked(weight, quant_state, rows.dtype)
    return rows @ whole.T if start is None else torch.addmm(start, rows, whole.T)


@torch.library.custom_op("tunesmith::nf4_product_back", mutates_args=())
def product_back(of_y: Tensor, start: Tensor | None, weight: Tensor, quant_state: Tensor) -> Tensor:
    """start + of_y · weight, (M, in); of_y (M, out)."""
    whole = unpacked(weight, quant_state, of_y.dtype)
    return of_y @ whole if start is None else torch.addmm(start, of_y, whole)


@product.register_fake
def _product_shape(rows: Tensor, start: Any, weight: Tensor, quant_state: Any) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])


@product_back.register_fake
def _product_back_shape(of_y: Tensor, start: Any, weight: Tensor, quant_state: Any) -> Tensor:
    return of_y.new_empty(of_y.shape[0], 2 * weight.shape[1])


def unpacked(weight: Tensor, quant_state: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight whole, (out, in)."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    outer, added, inner = _parts(quant_state, weight.numel())
    scales = dequantize_blockwise(inner, absmax=outer, blocksize=OUTER)
    scales += added.repeat_interleave(OUTER)[: len(scales)]
    shape = torch.Size((len(weight), 2 * weight.shape[1]))
    state = QuantState(scales, shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    whole: Tensor = dequantize_4bit(weight.view(-1, 1), state)
    return whole


def can_stack(layers: Sequence[Nf4Linear]) -> bool:
    """Whether none of their outer scales would reach into the next layer."""
    return not any(layer.weight.numel() * 2 % (BLOCK * OUTER) for layer in layers[:-1])


def stacked(layers: Sequence[Nf4Linear]) -> tuple[Tensor, Tensor]:
    """Weight and `quant_state` of layers as one, row behind row."""
    parts = [_parts(layer.quant_state, layer.weight.numel()) for layer in layers]
    outer, added, inner = (torch.cat(some) for some in zip(*parts, strict=True))
    as_bytes = torch.cat([outer.view(torch.uint8), added.view(torch.uint8), inner])
    return torch.cat([layer.weight.detach() for layer in layers]), as_bytes


def _parts(quant_state: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outer scales, what is added to scales, and inner ones, of a weight of so many bytes."""
    blocks = -(-2 * size // BLOCK)
    outer, added = quant_state[:-blocks].view(torch.float32).chunk(2)
    return outer, added, quant_state[-blocks:]


def values(weight: Tensor) -> int:
    """How many numbers a parameter holds."""
    return weight.numel() * (2 if weight.dtype == torch.uint8 else 1)


def loading(device: str | torch.device) -> dict[str, Any]:
    """What lets transformers pack a model's layers as it reads them, one after another."""
    from transformers import BitsAndBytesConfig

    make: Any = BitsAndBytesConfig
    config = make(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return {"quantization_config": config, "device_map": str(device)}


def take_over(model: nn.Module) -> None:
    """Make the layers that were packed while loading an `Nf4Linear` each.

    What is not packed is copied out of the file: on a CPU one weight would keep all of it mapped.
    """
    from bitsandbytes.nn import Linear4bit

    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit):
            weight = layer.weight
            model.set_submodule(name, Nf4Linear(weight.data, weight.quant_state, layer.bias))
    for weight in model.parameters():
        if weight.is_floating_point() and weight.is_cpu:
            weight.data = weight.data.clone()
