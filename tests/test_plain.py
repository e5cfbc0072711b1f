"""A PiSSA or OLoRA adapter made plain acts on the original base as it did on its remainder."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers_llama import LlamaCpp, apart
from tests.helpers_lora import random_lora
from tests.tiny_models import local_model, tiny_gguf, tiny_model_folder
from tunesmith.models.adapter import (
    AdapterInfo,
    check_adapter,
    load_adapter,
    read_adapter_config,
    save_adapter,
)
from tunesmith.models.gguf import lora_gguf
from tunesmith.models.plain import plain_lora
from tunesmith.models.weights import load_model

PROMPT = [1, 20, 30, 40, 50, 60, 70, 2, 5, 1]


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}],
    ids=["plain", "rslora", "patterns"],
)
def test_plain_acts_as_trained(start: str, settings: dict[str, Any], tmp_path: Path) -> None:
    import torch

    base = local_model(tiny_model_folder(tmp_path / "base"))
    packed = tiny_gguf(base.path, tmp_path / "tiny.gguf")
    info = AdapterInfo(
        base_name="tiny", base_source="local", base_revision="", base_sha256=base.sha256
    )
    tuned = random_lora(base, init_lora_weights=start, **settings)
    save_adapter(tuned, tmp_path / "initial", info)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                weight.data += 0.2 * torch.randn_like(weight)
    save_adapter(tuned, tmp_path / "trained", info)

    plain_lora(tmp_path / "trained", tmp_path / "initial", tmp_path / "plain")

    assert check_adapter(tmp_path / "plain", base) == ()
    assert read_adapter_config(tmp_path / "plain")["r"] == 8
    original = load_model(base, dtype=torch.float32)
    untouched = logits(original)
    loaded = load_adapter(original, tmp_path / "plain")
    torch.testing.assert_close(logits(loaded), logits(tuned), atol=2e-3, rtol=1e-3)
    assert (logits(tuned) - untouched).abs().max() > 0.5
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded), untouched)

    llama = LlamaCpp(packed, lora_gguf(tmp_path / "plain", base, tmp_path / "lora.gguf"))
    assert apart(llama, tuned, PROMPT) < 0.1
