"""LoRA's dropout: how much it keeps, and that the fused layer applies it as PEFT's does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear

from tests.test_forward import some_samples, tuned
from tunesmith.config import TrainSettings
from tunesmith.training.dropout import kept
from tunesmith.training.fused import FusedLinear


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_it_keeps_the_share_it_should_everywhere_and_each_entry_by_itself(
    probability: float,
) -> None:
    torch.manual_seed(0)
    mask = kept(torch.empty(1, 999, 1001), probability)[0].double()
    assert mask.mean() == pytest.approx(1 - probability, abs=2e-3)
    columns = mask.mean(0)  # four entries share a draw
    assert (columns - (1 - probability)).abs().max() < 0.1
    spread = mask.var()
    for distance in (1, 2, 3, 4):
        together = ((mask[:, distance:] - mask.mean()) * (mask[:, :-distance] - mask.mean())).mean()
        assert abs(together / spread) < 5e-3


def test_the_seed_decides_it() -> None:
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(kept(torch.empty(7, 13), 0.3))
    assert masks[0].equal(masks[1])
    assert not masks[0].equal(masks[2])


class Given(torch.nn.Module):
    """A dropout layer whose mask is drawn as the fused layer draws it."""

    p = 0.3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * kept(x, self.p) / (1 - self.p)


def test_gradients_are_those_of_pefts_layer_with_the_same_mask(tmp_path: Path) -> None:
    model = tuned(tmp_path, "qwen2", TrainSettings(lora_r=4, lora_dropout=0.3))
    layer: Any = next(one for one in model.modules() if type(one) is FusedLinear)
    x = torch.randn(2, 11, layer.in_features, dtype=torch.float64, requires_grad=True)
    layer.train()
    wanted = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    torch.manual_seed(3)
    output = layer(x)
    above = torch.randn_like(output)
    fused = (output, *torch.autograd.grad(output, wanted, above))
    layer.__class__, layer.lora_dropout["default"] = Linear, Given()
    torch.manual_seed(3)
    output = layer(x)
    plain = (output, *torch.autograd.grad(output, wanted, above))
    for one, other in zip(fused, plain, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_what_is_measured_is_measured_without_it(tmp_path: Path) -> None:
    model = tuned(tmp_path, "llama", TrainSettings(lora_r=4, lora_dropout=0.5))
    ids = torch.tensor([some_samples(2)[0].input_ids])
    layer: Any = next(one for one in model.modules() if type(one) is FusedLinear)
    x = torch.randn(1, ids.shape[1], layer.in_features, dtype=torch.float64)
    assert not layer.train()(x).equal(layer(x))
    assert layer.eval()(x).equal(layer(x))
