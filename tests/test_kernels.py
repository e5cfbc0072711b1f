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
from tunesmith.training.head import Head, Targets
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
    wide, gradient = random(rows, 2 * width), random(rows, width)
    inner, b = random(rows, 12), random(2 * width, 12)
    of_down, a_down = random(rows, 8), random(8, width)
    whole = (wide.double() + inner.double() @ b.double().T).requires_grad_()
    expected = silu(whole[:, :width]) * whole[:, width:]
    outer = gradient.double() + of_down.double() @ a_down.double()
    torch.autograd.backward(expected, outer)

    expected = expected.detach()
    assert distance(swiglu(wide, inner, b), expected) < 0.004
    of_wide, again = swiglu_backward(gradient, of_down, a_down, wide, inner, b)
    assert whole.grad is not None
    assert distance(of_wide, whole.grad) < 0.004
    assert distance(again, expected) < 0.004


@needs_gpu
def test_the_heads_loss_takes_no_more_memory_than_is_said() -> None:
    head = Head(random(50_000, 64), None, 1.0, None)
    rows = 2 * head.at_once
    hidden = random(rows, 64).requires_grad_()
    row = torch.arange(rows, device=GPU)
    targets = Targets(row, row % 50_000, torch.ones(rows, device=GPU), None, tuple(range(rows + 1)))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    head.loss(hidden, targets)
    taken = torch.cuda.max_memory_allocated() - before
    assert 0.8 * head.working_bytes < taken < 1.1 * head.working_bytes


@needs_gpu
def test_what_is_too_small_for_a_rounding_is_added_by_chance() -> None:
    from tunesmith.training.kernels.float8 import add_low_rank_

    torch.manual_seed(0)
    y, inner, b = 100 * random(500, 300), 0.01 * random(500, 5), random(5, 300).T
    low = inner.double() @ b.double().T
    bias = random(300)

    def added(found: torch.Tensor) -> float:
        return float(((found.double() - y.double()) * low).sum() / (low * low).sum())

    assert added((y.double() + low).bfloat16()) < 0.3
    assert abs(added(add_low_rank_(y.clone(), inner, b, None)) - 1) < 0.3
    large = add_low_rank_(y.clone(), 10_000 * inner, b, bias)
    assert distance(large, y.double() + 10_000 * low + bias.double()) < 0.005


@needs_gpu
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("sizes", [(256, 256), (256, 100), (300,)])
@pytest.mark.parametrize("share", [False, True])
def test_attention_of_segments(sizes: tuple[int, ...], share: bool, window: int | None) -> None:
    """One operator for all segments says what the plain lines say for each."""
    from tunesmith.data.packs import Sample, pack
    from tunesmith.training.forward import PackAttention, packed_attention

    torch.manual_seed(0)
    ids = [torch.randint(50, (size,)).tolist() for size in sizes]
    stem = tuple(ids[0][:90]) if share else ()
    samples = [Sample((*stem, *row), (True,) * (len(stem) + len(row))) for row in ids]
    packed = pack(samples)
    shape = (1, len(packed.tokens))
    q, k, v = (random(*shape, heads, 64).transpose(1, 2).requires_grad_() for heads in (6, 2, 2))
    outer = random(*shape, 6, 64)
    found = []
    for lengths in (True, False):
        said = PackAttention(packed.segments, GPU)
        said.lengths = said.lengths if lengths else None
        y, _ = packed_attention(
            torch.nn.Module(), q, k, v, None, pack_attention=said, sliding_window=window
        )
        found.append([y.detach(), *torch.autograd.grad(y, (q, k, v), outer)])
    for ours, plain in zip(*found, strict=True):
        assert distance(ours, plain) < 0.01


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

    from tunesmith.training.kernels.fuse import Stack, to_float8, use_kernels
    from tunesmith.training.lora import add_lora, trainable
    from tunesmith.training.memory import layers_of, mlps_of, recompute_activations

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
    assert max(len(part.layers) for part in model.modules() if isinstance(part, Stack)) == 3
    found = gradients()
    assert distance(found, expected) < bound
    assert all(map(mlps_of, layers_of(model)))
    recompute_activations(model, 1, 1)
    assert distance(gradients(), found) < (bound if float8 else 1e-6)  # fp8 rounds by chance
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
