"""A model whose layers stay in bf16 computes in float32 what its rounded weights say."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.test_forward import Gradients, in_packs, some_samples
from tests.tiny_models import ARCHITECTURES, tiny_model_folder
from tunesmith.config import TrainSettings
from tunesmith.training import device
from tunesmith.training.device import computes_wide
from tunesmith.training.forward import ATTENTION, arithmetic, register_attention
from tunesmith.training.lora import add_lora, trainable
from tunesmith.training.widened import WideLinear, widen

CPU = torch.device("cpu")


def in_bf16(path: Path, arch: str, settings: TrainSettings) -> Any:
    """A tiny model in bf16 with LoRA whose B matrices are not zero."""
    from transformers import AutoModelForCausalLM

    register_attention()
    auto: Any = AutoModelForCausalLM
    folder = tiny_model_folder(path / arch, arch)
    base = auto.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=ATTENTION)
    model = add_lora(base, settings)
    torch.manual_seed(1)
    for name, weight in trainable(model).items():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    return model


def distance(found: Gradients, expected: Gradients) -> float:
    return max(float((found[name] - one).norm() / one.norm()) for name, one in expected.items())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "settings",
    [
        TrainSettings(lora_r=4),
        TrainSettings(lora_r=4, lora_targets=("q_proj", "down_proj")),
        TrainSettings(lora_r=4, use_dora=True),
    ],
    ids=["all", "some", "dora"],
)
def test_gradients_are_those_of_the_same_weights_in_float32(
    arch: str, settings: TrainSettings, tmp_path: Path
) -> None:
    model, samples = in_bf16(tmp_path, arch, settings), some_samples(6)
    whole = copy.deepcopy(model).float()
    widen(model.get_base_model())
    with arithmetic(model.get_base_model()):
        found = in_packs(model, samples, 6)
    assert distance(found, in_packs(whole, samples, 6)) < 1e-4


def test_only_the_linear_layers_stay_narrow(tmp_path: Path) -> None:
    model = in_bf16(tmp_path, "qwen2", TrainSettings(lora_r=4))
    widen(model.get_base_model())
    narrow = {name for name, one in model.named_parameters() if one.dtype == torch.bfloat16}
    linear = {name for name, one in model.named_modules() if type(one) is WideLinear}
    assert narrow == {f"{name}.weight" for name in linear}
    assert len(linear) == 2 * 7
    assert type(model.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize("wins", [True, False])
def test_a_cpu_computes_wide_where_bf16_is_the_slower(
    wins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_bfloat16_wins", lambda: wins)
    assert computes_wide(CPU, torch.bfloat16) is not wins
    assert not computes_wide(CPU, torch.float32)
    assert not computes_wide(torch.device("cuda"), torch.bfloat16)
