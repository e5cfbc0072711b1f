"""A packed step computes what plain transformers + PEFT computes sample by sample."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch.nn.functional import cross_entropy

from tests.tiny_models import ARCHITECTURES, tiny_model_folder, vocab_size
from tunesmith.config import TrainSettings
from tunesmith.data.packs import Sample, pack
from tunesmith.errors import TrainingError
from tunesmith.training.forward import ATTENTION, pack_loss, prove_packing, register_attention
from tunesmith.training.fused import FusedLinear
from tunesmith.training.lora import add_lora, trainable
from tunesmith.training.memory import recompute_activations

# Of a gradient's norm. The models themselves compute norms and rotary angles in float32, whatever
# their dtype, which leaves differences near 1e-7; a wrong mask or weight is far above this.
TOLERANCE = 1e-6

Gradients = dict[str, torch.Tensor]


def some_samples(count: int = 16) -> list[Sample]:
    """Two system prompts, three first turns, answers of their own; some samples are equal."""
    generator = torch.Generator().manual_seed(5)

    def ids(length: int) -> tuple[int, ...]:
        size = vocab_size()
        return tuple(torch.randint(3, size, (length,), generator=generator).tolist())

    systems, turns = [ids(20), ids(12)], [ids(9), ids(14), ids(3)]
    found = []
    for number in range(count - 1):
        prompt = systems[number % 2] + turns[number % 3]
        answer = ids(4 + number % 5)
        found.append(Sample(prompt + answer, (False,) * len(prompt) + (True,) * len(answer)))
    return [*found, found[0]]


def tuned(path: Path, arch: str, settings: TrainSettings | None = None, **over: Any) -> Any:
    """A tiny float64 model with LoRA whose B matrices are not zero."""
    from transformers import AutoModelForCausalLM

    register_attention()
    folder = tiny_model_folder(path / arch, arch, dtype="float64", **over)
    auto: Any = AutoModelForCausalLM
    base = auto.from_pretrained(folder, dtype=torch.float64, attn_implementation=ATTENTION)
    model = add_lora(base, settings or TrainSettings(lora_r=4))
    generator = torch.Generator().manual_seed(1)
    for name, weight in trainable(model).items():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.1
    assert all(weight.dtype == torch.float64 for weight in model.parameters())
    return model


def gradients(model: Any) -> Gradients:
    found = {name: weight.grad for name, weight in trainable(model).items()}
    assert all(grad is not None and grad.abs().max() > 0 for grad in found.values())
    model.zero_grad()
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def alone(model: Any, samples: list[Sample]) -> Gradients:
    """The reference: each sample through the model's own attention and logits, and PEFT's LoRA."""
    plain = copy.deepcopy(model)
    fused = [module for module in plain.modules() if type(module) is FusedLinear]
    assert fused
    for module in fused:
        module.__class__ = Linear
    capped = getattr(plain.config, "attn_logit_softcapping", None)
    plain.get_base_model().set_attn_implementation("eager" if capped else "sdpa")
    weight = sum(sample.trained_tokens for sample in samples)
    for sample in samples:
        ids = torch.tensor([sample.input_ids])
        logits = plain(input_ids=ids).logits[0, :-1]
        losses = cross_entropy(logits, ids[0, 1:], reduction="none")
        torch.autograd.backward(losses[torch.tensor(sample.trained[1:])].sum() / weight)
    return gradients(plain)


def in_packs(model: Any, samples: list[Sample], size: int, *, share: bool = True) -> Gradients:
    weight = sum(sample.trained_tokens for sample in samples)
    head = prove_packing(model.get_base_model(), samples[:2])
    assert head is not None
    for start in range(0, len(samples), size):
        loss = pack_loss(model, pack(samples[start : start + size], share=share), head)
        torch.autograd.backward(loss / weight)
    return gradients(model)


def assert_equal(found: Gradients, expected: Gradients) -> None:
    for name, grad in expected.items():
        error = (found[name] - grad).norm() / grad.norm()
        assert error <= TOLERANCE, f"{name}: {error:.1e}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_packed_step_has_the_gradients_of_its_samples_alone(arch: str, tmp_path: Path) -> None:
    model, samples = tuned(tmp_path, arch), some_samples()
    assert len(pack(samples).tokens) < pack(samples).real_tokens * 0.75
    expected = alone(model, samples)
    for size in (16, 4, 1):
        assert_equal(in_packs(model, samples, size), expected)
    whole = in_packs(model, samples, 16)
    for size in (4, 1):
        assert_equal(in_packs(model, samples, size), whole)
    assert_equal(in_packs(model, samples, 16, share=False), whole)


@pytest.mark.parametrize("arch", ["mistral", "qwen2", "gemma2", "gemma3_text"])
def test_a_sliding_window_reaches_across_segments(arch: str, tmp_path: Path) -> None:
    model, samples = tuned(tmp_path, arch, sliding_window=10), some_samples(6)
    expected = alone(model, samples)
    assert_equal(in_packs(model, samples, 6), expected)


@pytest.mark.parametrize(
    "settings",
    [
        TrainSettings(lora_r=4, use_dora=True),
    ],
)
def test_what_is_no_plain_lora_keeps_pefts_forward(settings: TrainSettings, tmp_path: Path) -> None:
    model = tuned(tmp_path, "llama", settings)
    assert not any(type(module) is FusedLinear for module in model.modules())


@pytest.mark.parametrize(
    "settings",
    [
        TrainSettings(lora_r=4, use_rslora=True),
        TrainSettings(lora_r=4, lora_alpha=3, lora_targets=("q_proj", "down_proj")),
        TrainSettings(lora_r=4, init_lora="orthogonal"),
    ],
)
def test_scales_targets_and_initialisations_are_fused(
    settings: TrainSettings, tmp_path: Path
) -> None:
    model, samples = tuned(tmp_path, "qwen2", settings), some_samples(4)
    assert_equal(in_packs(model, samples, 4), alone(model, samples))


@pytest.mark.parametrize("layers", [1, 2])
def test_recomputing_in_some_or_all_layers_changes_nothing(layers: int, tmp_path: Path) -> None:
    model, samples = tuned(tmp_path, "llama"), some_samples(6)
    expected = in_packs(model, samples, 6)
    recompute_activations(model, layers)
    model.train()
    assert_equal(in_packs(model, samples, 6), expected)


@pytest.mark.parametrize(
    ("arch", "config", "why"),
    [
        ("bloom", {"n_head": 4}, "its losses there differ"),
        ("mamba", {}, "carry a state"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "carry a state"),
    ],
)
def test_a_model_that_packs_would_train_wrongly_is_refused(
    arch: str, config: dict[str, Any], why: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    sizes: dict[str, Any] = {"vocab_size": vocab_size(), "hidden_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(arch, initializer_range=0.2, **sizes, **config))
    with pytest.raises(TrainingError, match=f"cannot be trained in packs: .*{why}"):
        prove_packing(model, some_samples(2))


def test_a_model_of_plain_attention_is_accepted_and_left_as_it_was(tmp_path: Path) -> None:
    base = tuned(tmp_path, "gemma2", sliding_window=10).get_base_model()
    prove_packing(base, some_samples(2))
    assert base.config._attn_implementation == ATTENTION
