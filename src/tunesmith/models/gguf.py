"""A PEFT adapter as the GGUF file llama.cpp puts on a running model."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import ModelError
from tunesmith.language import t
from tunesmith.models.adapter import (
    WEIGHTS,
    adapter_tensors,
    fingerprint,
    read_adapter_config,
    read_values,
)
from tunesmith.models.headers import gguf_header
from tunesmith.models.safety import read_json
from tunesmith.models.store import LocalModel
from tunesmith.paths import cache_dir

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# transformers' model_type → llama.cpp's architecture, for those whose weights map one to one.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
# Where llama.cpp stores the rows of q and k interleaved, as its rotary embedding reads them.
_PERMUTED = frozenset(("llama",))

# Settings that change more than W + scale · B A, and so have no place in the file.
_BEYOND_LORA = (
    *("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters"),
    *("layer_replication", "lora_bias", "fan_in_fan_out", "use_qalora", "alora_invocation_tokens"),
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class _Base:
    """What the writer needs to know of the base model."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    tied: bool


def lora_gguf(adapter: Path, base: LocalModel, out: Path | None = None) -> Path:
    """Write the adapter as a llama.cpp LoRA file and return its path.

    Args:
        adapter: A PEFT adapter folder that passed `check_adapter` for this base.
        base: The model it belongs to; its architecture decides names and row order.
        out: Where to; by default in the cache, where an adapter already written is found again.

    Raises:
        ModelError: The architecture is not supported, or the adapter does more than LoRA.
    """
    if out is None:
        key = f"{fingerprint(adapter)}-{base.sha256[:16]}"
        out = cache_dir() / "lora-gguf" / f"{key}.gguf"
        if out.is_file():
            return out
    config = read_adapter_config(adapter)
    _require_plain(adapter, config)
    target = _describe(base)
    alpha = _scale(config, config["r"], config["lora_alpha"]) * config["r"] or float(config["r"])
    _write(out, target, alpha, dict(_matrices(adapter, config, target, alpha)))
    return out


def _require_plain(adapter: Path, config: dict[str, Any]) -> None:
    used = [name for name in _BEYOND_LORA if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
        used.append(f"init_lora_weights={config['init_lora_weights']}")
    if used:
        raise ModelError(
            t(
                "llama.cpp cannot run the adapter {path}, because it uses {features}; "
                "run it with the transformers engine, or merge it into its base model.",
                path=adapter,
                features=", ".join(used),
            )
        )


def _describe(base: LocalModel) -> _Base:
    described = _from_gguf(base.path) if base.is_gguf else _from_config(base.path)
    if described.architecture not in ARCHITECTURES.values():
        raise ModelError(
            t(
                "Adapters for {model} ({architecture}) cannot be written for llama.cpp; "
                "run it with the transformers engine.",
                model=base.name,
                architecture=described.architecture,
            )
        )
    return described


def _from_gguf(path: Path) -> _Base:
    header = gguf_header(path)
    architecture, metadata = header.architecture, header.metadata
    heads = metadata[f"{architecture}.attention.head_count"]
    return _Base(
        architecture=architecture,
        layers=metadata[f"{architecture}.block_count"],
        heads=heads,
        kv_heads=metadata.get(f"{architecture}.attention.head_count_kv", heads),
        tied="output.weight" not in header.tensors,
    )


def _from_config(folder: Path) -> _Base:
    config = read_json(folder / "config.json")
    kind = config["model_type"]
    heads = config["num_attention_heads"]
    return _Base(
        architecture=ARCHITECTURES.get(kind, kind),
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        tied=bool(config.get("tie_word_embeddings", kind.startswith("gemma"))),
    )


def _matrices(
    adapter: Path, config: dict[str, Any], base: _Base, alpha: float
) -> "Iterator[tuple[str, NDArray[np.float32]]]":
    """Each tensor of the file: A (r, in) as `NAME.weight.lora_a`, B (out, r) as `.lora_b`."""
    tensors = adapter_tensors(adapter)
    names = _Names(base)
    for name, tensor in sorted(tensors.items()):
        module, part, rest = name.removeprefix("base_model.model.").rpartition(".lora_")
        target = names.find(module)
        if not part or rest not in ("A.weight", "B.weight") or target is None:
            raise ModelError(
                t("llama.cpp cannot run the adapter {path}: it has no place for {name}.",
                  path=adapter, name=name)
            )  # fmt: skip
        values = read_values(adapter / WEIGHTS, tensor)
        if rest == "B.weight":
            rank = tensor.shape[1]
            values = _permute(values, target, base)
            # llama.cpp scales by alpha / rank; what differs from that goes into B.
            values = values * (_scale(config, rank, _alpha(config, module)) * rank / alpha)
        yield f"{target}.weight.lora_{rest[0].lower()}", values.astype("<f4")


class _Names:
    """transformers' module names to llama.cpp's tensor names, without `.weight`."""

    def __init__(self, base: _Base) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
        self._map = get_tensor_name_map(kinds[base.architecture], base.layers)
        self._tied = base.tied

    def find(self, module: str) -> str | None:
        """llama.cpp's name, or None where LoRA has no effect there."""
        name: str | None = self._map.get_name(module)
        return None if name == "output" and self._tied else name


def _permute(values: "NDArray[np.float32]", name: str, base: _Base) -> "NDArray[np.float32]":
    """Rows of a q or k matrix in llama.cpp's order: each head's two halves interleaved."""
    heads = {"attn_q": base.heads, "attn_k": base.kv_heads}.get(name.rsplit(".", 1)[-1])
    if heads is None or base.architecture not in _PERMUTED:
        return values
    rows, rank = values.shape
    halves = values.reshape(heads, 2, rows // heads // 2, rank)
    return halves.swapaxes(1, 2).reshape(rows, rank)


def _scale(config: dict[str, Any], rank: int, alpha: float) -> float:
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


def _alpha(config: dict[str, Any], module: str) -> float:
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(alpha)
    return float(config["lora_alpha"])


def _write(out: Path, base: _Base, alpha: float, tensors: "dict[str, NDArray[np.float32]]") -> None:
    from gguf import GGUFWriter, Keys

    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        writer = GGUFWriter(part, base.architecture)
        writer.add_type("adapter")
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        for name, values in tensors.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
