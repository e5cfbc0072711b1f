"""Put the kernels where they compute what the model's own layers compute."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunesmith.models.nf4 import Nf4Linear, can_stack, stacked
from tunesmith.training.fused import FusedLinear
from tunesmith.training.kernels.float8 import Float8Linear, quantise_rows
from tunesmith.training.kernels.lora import LoraLinear, LoraMlp

if TYPE_CHECKING:
    from peft import PeftModel

READ_THE_SAME = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def use_kernels(model: "PeftModel") -> None:
    """Let LoRA layers and MLPs run through the kernels.

    An MLP is taken only if the kernel says the same as the model's own code.
    """
    for module in model.modules():
        if type(module) is FusedLinear:
            module.__class__ = KernelLinear
    for module in list(model.modules()):
        for names in READ_THE_SAME:
            layers: Any = [getattr(module, name, None) for name in names]
            if all(isinstance(layer, KernelLinear) for layer in layers):
                Stack.join(layers)
    for module in list(model.modules()):
        if isinstance(module, KernelLinear) and not module.joined:
            Stack.join([module])
    for module in model.modules():
        stack = getattr(getattr(module, "gate_proj", None), "stack", None)
        if isinstance(stack, Stack) and len(stack.layers) == 2:
            _take_mlp(module)


def to_float8(model: "PeftModel") -> None:
    """Keep the frozen weights below LoRA in fp8, after `use_kernels`."""
    for module in list(model.modules()):
        if isinstance(module, Stack):
            module.to_float8()
    torch.cuda.empty_cache()


class KernelLinear(FusedLinear):
    """PEFT's LoRA layer; the first of those that read the same computes for all of them.

    Attributes:
        stack: Of the first, they as one.
        joined: Whether it is in a stack, of its own or another's.
        given: Of the others, what was read and what the first has computed from it.
    """

    stack: "Stack | None"
    joined = False
    given: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return (…, out) for x (…, in)."""
        given, self.given = self.given, None
        if given is not None and given[0] is x and not (args or kwargs):
            return given[1]
        stack = self.stack
        if stack is None or args or kwargs or not stack.is_on():
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        first, *others = stack(x).split(stack.sizes, -1)
        for layer, y in zip(stack.layers[1:], others, strict=True):
            layer.given = (x, y)
        output: Tensor = first
        return output


class Stack(nn.Module):
    """LoRA layers that read the same, as one layer: their weights row behind row.

    Attributes:
        layers: They; their own weights are views of the one below.
        sizes: How many rows each has.
        weight: (out, in) in bf16 or fp8, or (out, in / 2) in 4 bits.
        row_scale: What each row of a weight in fp8 is multiplied with, (out,) float32; or the
            `quant_state` of one in 4 bits.
        turned: A weight in fp8 as (in, out), for the gradient of the input.
        bias: (out,), zeros for layers without; None if all are.
    """

    weight: Tensor
    row_scale: Tensor | None
    turned: Tensor | None
    bias: Tensor | None

    def __init__(self, layers: Sequence[KernelLinear]) -> None:
        super().__init__()
        self.layers = tuple(layers)  # not a ModuleList: they live where the model has them
        bases = [layer.base_layer for layer in layers]
        self.sizes = [base.out_features for base in bases]
        weight, scale = _joined(bases)
        bias = None
        if any(base.bias is not None for base in bases):
            bias = torch.cat([_bias(base) for base in bases])
        buffers = {"weight": weight, "bias": bias, "row_scale": scale, "turned": None}
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)
        for base, rows in zip(bases, self.weight.split(self.sizes), strict=True):
            base.weight.data = rows

    @classmethod
    def join(cls, layers: Sequence[KernelLinear]) -> None:
        """Let the first of the layers compute for all, if they can be one."""
        bases = [layer.base_layer for layer in layers]
        packed = {isinstance(base, Nf4Linear) for base in bases}
        if len({base.in_features for base in bases}) == len(packed) == 1 and (
            packed == {False} or can_stack(bases)
        ):
            for layer in layers:
                layer.stack, layer.joined, layer.given = None, True, None
            layers[0].stack = cls(layers)

    def is_on(self) -> bool:
        """Whether each layer is its base and one adapter without dropout."""
        return all(map(_is_on, self.layers))

    def low(self) -> tuple[Tensor, Tensor]:
        """LoRA's a (r, in) and b (out, r) of all, b times its scale, in bf16."""
        parts = [(layer, next(iter(layer.lora_A))) for layer in self.layers]
        a = [layer.lora_A[name].weight for layer, name in parts]
        b = [layer.lora_B[name].weight * layer.scaling[name] for layer, name in parts]
        if len(parts) > 1:
            a, b = [torch.cat(a)], [torch.block_diag(*b)]
        return a[0].to(torch.bfloat16), b[0].to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, out) for x (…, in), in bf16."""
        output: Tensor = LoraLinear.apply(
            x.to(torch.bfloat16), self.weight, self.row_scale, self.turned, self.bias, *self.low()
        )
        return output

    def to_float8(self) -> None:
        """Round the weight, each row to its own scale."""
        if any(size % 16 for size in (*self.sizes, self.weight.shape[1])):  # tensor cores' step
            return
        values, scale = quantise_rows(self.weight)
        self.weight, self.row_scale, self.turned = values, scale[:, 0], values.T.contiguous()
        rows, scales = values.split(self.sizes), self.row_scale.split(self.sizes)
        for layer, some, their in zip(self.layers, rows, scales, strict=True):
            layer.base_layer = Float8Linear(some, their, layer.base_layer.bias)


class KernelMlp(nn.Module):
    """Before the model's own MLP in the order of its classes: down(silu(gate(x)) · up(x)).

    Attributes:
        recomputes: Whether gate and up are computed again in backward, to save memory.
    """

    recomputes = False

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, D) for x (…, D)."""
        parts: Any = self
        stacks: tuple[Stack, Stack] = (parts.gate_proj.stack, parts.down_proj.stack)
        if not all(stack.is_on() for stack in stacks):
            plain: Tensor = super().forward(x)
            return plain
        frozen = [stack.weight for stack in stacks]
        for part in ("row_scale", "turned"):
            frozen += [one for stack in stacks if (one := getattr(stack, part)) is not None]
        a, b = zip(*(stack.low() for stack in stacks), strict=True)
        output: Tensor = LoraMlp.apply(
            x.to(torch.bfloat16), not self.recomputes, len(frozen), *frozen, *a, *b
        )
        return output


def _is_on(layer: KernelLinear) -> bool:
    (name,) = layer.lora_A
    dropout = layer.training and getattr(layer.lora_dropout[name], "p", 0.0)
    return not (layer.disable_adapters or layer.merged or dropout)


def _joined(bases: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """The weights row behind row, and their `quant_state` if they are in 4 bits."""
    if len(bases) == 1:
        return bases[0].weight.detach(), getattr(bases[0], "quant_state", None)
    packed = [base for base in bases if isinstance(base, Nf4Linear)]
    if packed:
        return stacked(packed)
    return torch.cat([base.weight.detach() for base in bases]), None


def _bias(layer: Any) -> Tensor:
    dtype = getattr(layer, "dtype", layer.weight.dtype)
    zeros: Tensor = layer.weight.new_zeros(layer.out_features, dtype=dtype)
    return zeros if layer.bias is None else layer.bias.detach()


@cache
def _with_kernel(own: Any) -> Any:
    """One class for all layers: a compiled layer would be compiled again for another."""
    return type(own.__name__, (KernelMlp, own), {})


def _take_mlp(module: nn.Module) -> None:
    parts: Any = module
    stacks = (parts.gate_proj.stack, getattr(getattr(module, "down_proj", None), "stack", None))
    activation = getattr(module, "act_fn", None)
    if any(stack is None or stack.bias is not None for stack in stacks) or activation is None:
        return
    if not _is_silu(activation):
        return
    own: Any = type(module)
    x = torch.randn(32, parts.gate_proj.in_features, device=stacks[0].weight.device).bfloat16()
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
