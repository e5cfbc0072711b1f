"""The kernels of a GPU compute what the plain lines do; and what is said where there is none."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from tests.tiny_models import tiny_model_folder
from tunesmith.config import TrainSettings
from tunesmith.errors import TrainingError
from tunesmith.training.device import has_kernels
from tunesmith.training.train import train

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(not has_kernels(GPU, torch.bfloat16), reason="needs an NVIDIA GPU")


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=GPU, dtype=dtype)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of two tensors, as a share of the second."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@needs_gpu
def test_swiglu_and_its_gradients_with_lora_on_the_way() -> None:
    from tunesmith.training.kernels.swiglu import swiglu, swiglu_backward

    torch.manual_seed(0)
    rows, width = 70, 200
    gate, up, gradient = (random(rows, width) for _ in range(3))
    inner, b = (random(rows, 8), random(rows, 4)), (random(width, 8), random(width, 4))
    of_down, a_down = random(rows, 8), random(8, width)
    scales = (0.5, 2.0)
    whole = [
        (base.double() + scale * low.double() @ high.double().T).requires_grad_()
        for base, scale, low, high in zip((gate, up), scales, inner, b, strict=True)
    ]
    expected = silu(whole[0]) * whole[1]
    outer = gradient.double() + of_down.double() @ a_down.double()
    torch.autograd.backward(expected, outer)

    expected = expected.detach()
    assert distance(swiglu(gate, up, inner, b, scales), expected) < 0.004
    found = swiglu_backward(gradient, of_down, a_down, gate, up, inner, b, scales)
    for ours, theirs in zip(found, (whole[0].grad, whole[1].grad, expected), strict=True):
        assert theirs is not None
        assert distance(ours, theirs) < 0.004


@needs_gpu
def test_the_heads_softmax_in_place() -> None:
    from tunesmith.training.kernels.softmax import softmax_

    logits, weight = 3 * random(5, 9000, dtype=torch.float32), torch.rand(5, device=GPU)
    expected = 0.5 * weight[:, None] * (0.5 * logits).softmax(-1)
    normaliser = (0.5 * logits).logsumexp(-1)
    assert torch.allclose(softmax_(logits, weight, 0.5), normaliser, rtol=1e-6)
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-9)


@needs_gpu
@pytest.mark.parametrize(("float8", "bound"), [(False, 0.03), (True, 0.4)])
def test_a_model_through_the_kernels_has_the_same_gradients(
    tmp_path: Path, float8: bool, bound: float
) -> None:
    """Bounds: two products in bf16 differ by a hundredth here, e4m3 keeps three bits."""
    from transformers import AutoModelForCausalLM

    from tunesmith.training.kernels.fuse import to_float8, use_kernels
    from tunesmith.training.lora import add_lora, trainable

    auto: Any = AutoModelForCausalLM
    base = auto.from_pretrained(tiny_model_folder(tmp_path), dtype=torch.bfloat16).to(GPU)
    model = add_lora(base, TrainSettings())
    torch.manual_seed(0)
    for weight in trainable(model).values():
        torch.nn.init.normal_(weight, std=0.1)
    ids = torch.randint(base.config.vocab_size, (2, 50), device=GPU)

    def gradients() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        model.zero_grad()
        loss.backward()
        parts = [one.grad.flatten() for one in trainable(model).values() if one.grad is not None]
        return torch.cat(parts)

    expected = gradients()
    use_kernels(model)
    if float8:
        to_float8(model)
    assert any(type(part).__mro__[1].__name__ == "KernelMlp" for part in model.modules())
    assert distance(gradients(), expected) < bound
    with model.disable_adapter(), torch.no_grad():
        assert torch.isfinite(model(input_ids=ids).logits).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (TrainSettings(base_dtype="fp8", device="cpu"), "Hopper"),
        (TrainSettings(compile=True, device="cpu"), "--compile is for a GPU"),
    ],
)
def test_what_needs_a_gpu_is_refused_before_anything_is_made(
    settings: TrainSettings, message: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=message):
        next(train(replace(settings, out=run)))
    assert not run.exists()
