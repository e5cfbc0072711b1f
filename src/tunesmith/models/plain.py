"""Adapters whose start changed the base model, as plain LoRA for the unchanged one.

PiSSA and OLoRA move the largest part of each weight into the adapter before training, so what they
train belongs to what is left of the base. Subtracting the start from the end gives a LoRA of twice
the rank that belongs to the base as it was published, which every engine can run and switch off.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.models.adapter import (
    CONFIG,
    INFO,
    WEIGHTS,
    adapter_tensors,
    read_adapter_config,
    read_values,
)
from tunesmith.paths import new_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def plain_lora(trained: Path, initial: Path, out: Path) -> None:
    """Write to `out` the adapter that does to the original base what `trained` does to the rest.

    With scale s, start A₀, B₀ and end A, B: s (B A - B₀ A₀) = s [B | -B₀] [A ; A₀].

    Args:
        trained: The adapter after training.
        initial: The same adapter before the first step.
        out: Where the new adapter folder appears, whole or not at all.

    Raises:
        ModelError: An adapter's files are broken.
    """
    from safetensors.numpy import save_file

    end, start = _values(trained), _values(initial)
    with new_folder(out) as part:
        tensors = {name: _joined(name, end[name], start) for name in end}
        save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
        config = json.dumps(_doubled(read_adapter_config(trained)), indent=2, sort_keys=True)
        (part / CONFIG).write_text(config + "\n", encoding="utf-8")
        if (trained / INFO).is_file():
            (part / INFO).write_bytes((trained / INFO).read_bytes())


def _values(adapter: Path) -> "dict[str, NDArray[np.float32]]":
    tensors = adapter_tensors(adapter)
    return {name: read_values(adapter / WEIGHTS, tensor) for name, tensor in tensors.items()}


def _joined(
    name: str, end: "NDArray[np.float32]", start: "dict[str, NDArray[np.float32]]"
) -> "NDArray[np.float32]":
    import numpy as np

    if name.endswith(".lora_A.weight"):
        return np.concatenate([end, start[name]], axis=0)  # (2r, in)
    if name.endswith(".lora_B.weight"):
        return np.concatenate([end, -start[name]], axis=1)  # (out, 2r)
    return end


def _doubled(config: dict[str, Any]) -> dict[str, Any]:
    """Twice the rank at the same scale, which is alpha / r, or alpha / √r for rsLoRA."""
    factor = 2**0.5 if config.get("use_rslora") else 2
    alphas = {name: alpha * factor for name, alpha in (config.get("alpha_pattern") or {}).items()}
    ranks = {name: rank * 2 for name, rank in (config.get("rank_pattern") or {}).items()}
    return config | {
        "init_lora_weights": True,
        "r": config["r"] * 2,
        "lora_alpha": config["lora_alpha"] * factor,
        "alpha_pattern": alphas,
        "rank_pattern": ranks,
    }
