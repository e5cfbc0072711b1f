"""Norms as one function say what the model's own say, and nothing else is taken for one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.test_forward import alone, assert_equal, in_packs, some_samples, tuned
from tests.tiny_models import ARCHITECTURES
from tunesmith.training.norm import FusedNorm, RmsNorm, fuse_norms

rms_norm: Any = RmsNorm.apply


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_are_those_of_the_models_own_norms(arch: str, tmp_path: Path) -> None:
    model, samples = tuned(tmp_path, arch), some_samples(6)
    norms = [one for name, one in model.named_modules() if name.endswith("norm")]
    for norm in norms:
        norm.weight.data += 0.1 * torch.randn_like(norm.weight)
    expected = alone(model, samples)
    fuse_norms(model.get_base_model())
    assert norms
    assert all(isinstance(norm, FusedNorm) for norm in norms)
    assert_equal(in_packs(model, samples, 6), expected)


def test_gradient_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda one: rms_norm(one, scale, 1e-3), (x,))


def test_bf16_is_summed_in_float32() -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(64, 512).bfloat16().requires_grad_(), torch.rand(512)
    above = torch.randn(64, 512).bfloat16()
    found: Any = rms_norm(x, scale, 1e-6)
    (gradient,) = torch.autograd.grad(found, x, above)
    assert found.dtype == gradient.dtype == torch.bfloat16
    exact = x.detach().double().requires_grad_()
    expected: Any = rms_norm(exact, scale.double(), 1e-6)
    (right,) = torch.autograd.grad(expected, exact, above.double())
    assert (found - expected).norm() < 2**-8 * expected.norm()
    assert (gradient - right).norm() < 2**-8 * right.norm()


class Centred(nn.Module):
    """Takes the mean away first, as no RMS norm does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8), requires_grad=False)
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (…, 8)."""
        return nn.functional.layer_norm(x, (8,), self.weight, None, self.eps)


class Gated(Centred):
    """Reads more than x."""

    def forward(self, x: torch.Tensor, gate: Any = None) -> torch.Tensor:
        """Return (…, 8)."""
        found: torch.Tensor = super().forward(x) * gate.sigmoid()
        return found


def test_another_norm_is_left_to_itself() -> None:
    trained = nn.RMSNorm(8, eps=1e-6)
    model: Any = nn.Sequential(Centred(), Gated(), trained)
    fuse_norms(model)
    assert not any(isinstance(module, FusedNorm) for module in model.modules())
    trained.weight.requires_grad_(False)
    fuse_norms(model)
    assert [isinstance(module, FusedNorm) for module in model] == [False, False, True]
