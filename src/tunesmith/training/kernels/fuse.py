"""Put the kernels where they compute what the model's own layers compute."""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunesmith.training.fused import FusedLinear
from tunesmith.training.kernels.float8 import Float8Linear
from tunesmith.training.kernels.lora import LoraLinear, LoraMlp

if TYPE_CHECKING:
    from peft import PeftModel

PARTS = ("gate_proj", "up_proj", "down_proj")


def use_kernels(model: "PeftModel") -> None:
    """Let LoRA layers and MLPs run through the kernels.

    An MLP is taken only if the kernel says the same as the model's own code.
    """
    for module in model.modules():
        if type(module) is FusedLinear:
            module.__class__ = KernelLinear
    for module in model.modules():
        if all(isinstance(getattr(module, part, None), KernelLinear) for part in PARTS):
            _take_mlp(module)


def to_float8(model: "PeftModel") -> None:
    """Keep the frozen weights below LoRA in fp8, after `use_kernels`."""
    for module in list(model.modules()):
        if isinstance(module, KernelLinear):
            weight = module.base_layer.weight
            if all(size % 16 == 0 for size in weight.shape):  # the tensor cores' step
                module.base_layer = Float8Linear(module.base_layer)
    torch.cuda.empty_cache()


class KernelLinear(FusedLinear):
    """PEFT's LoRA layer through `LoraLinear` wherever its one adapter is on."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return (…, out) for x (…, in)."""
        if args or kwargs or not is_on(self):
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        (name,) = self.lora_A
        base = self.base_layer
        output: Tensor = LoraLinear.apply(
            x.to(torch.bfloat16), base.weight, getattr(base, "row_scale", None),
            getattr(base, "turned", None), base.bias, self.lora_A[name].weight,
            self.lora_B[name].weight, self.scaling[name],
        )  # fmt: skip
        return output


def is_on(layer: KernelLinear) -> bool:
    """Whether the layer is its base and one adapter without dropout."""
    (name,) = layer.lora_A
    dropout = layer.training and getattr(layer.lora_dropout[name], "p", 0.0)
    return not (layer.disable_adapters or layer.merged or dropout)


class KernelMlp(nn.Module):
    """Before the model's own MLP in the order of its classes: down(silu(gate(x)) · up(x))."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, D) for x (…, D)."""
        layers: Any = [getattr(self, part) for part in PARTS]
        if not all(is_on(layer) for layer in layers):
            plain: Tensor = super().forward(x)
            return plain
        names = [next(iter(layer.lora_A)) for layer in layers]
        bases = [layer.base_layer for layer in layers]
        frozen = [base.weight for base in bases]
        for part in ("row_scale", "turned"):
            frozen += [getattr(base, part) for base in bases if hasattr(base, part)]
        a = [layer.lora_A[name].weight for layer, name in zip(layers, names, strict=True)]
        b = [layer.lora_B[name].weight for layer, name in zip(layers, names, strict=True)]
        scales = tuple(layer.scaling[name] for layer, name in zip(layers, names, strict=True))
        output: Tensor = LoraMlp.apply(x.to(torch.bfloat16), scales, len(frozen), *frozen, *a, *b)
        return output


@cache
def _with_kernel(own: Any) -> Any:
    """One class for all layers: a compiled layer would be compiled again for another."""
    return type(own.__name__, (KernelMlp, own), {})


def _take_mlp(module: nn.Module) -> None:
    layers: Any = [getattr(module, part) for part in PARTS]
    activation = getattr(module, "act_fn", None)
    with_bias = any(layer.base_layer.bias is not None for layer in layers)
    if with_bias or activation is None or not _is_silu(activation):
        return
    own: Any = type(module)
    x = torch.randn(32, layers[0].in_features, device=layers[0].base_layer.weight.device).bfloat16()
    with torch.no_grad():
        expected = module(x)
        module.__class__ = _with_kernel(own)
        found = module(x)
    if not float((found - expected).float().norm() / expected.float().norm()) < 0.02:
        module.__class__ = own


def _is_silu(activation: Any) -> bool:
    """Looked at alone: in the sums of an MLP, GELU is hard to tell from it in bf16."""
    x = torch.linspace(-8, 8, 100)
    return torch.allclose(activation(x), torch.nn.functional.silu(x), rtol=1e-5, atol=1e-6)
