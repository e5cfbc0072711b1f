"""LoRA adapters in PEFT's format, with a note of the base model they belong to."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import ModelError
from tunesmith.language import t
from tunesmith.models.headers import Tensor, gguf_header, safetensors_header
from tunesmith.models.quiet import quiet
from tunesmith.models.safety import repository, weight_files
from tunesmith.models.store import LocalModel
from tunesmith.models.tokenizer import load_tokenizer, read_tokenizer
from tunesmith.paths import new_folder, write_atomic

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from peft import PeftModel
    from transformers import PreTrainedModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INFO = "tunesmith.json"

_PREFIX = "base_model.model."
_GGUF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """What an adapter was trained on and how it is to be talked to; kept in `tunesmith.json`.

    `system` is the system prompt it was trained with, used by default. `identity` is the name and
    the author it was taught to give. `tokenizer_sha256` is a `ChatTokenizer.fingerprint`.
    """

    base_name: str
    base_source: str
    base_revision: str
    base_sha256: str
    system: str | None = None
    template_sha256: str | None = None
    tokenizer_sha256: str | None = None
    identity: tuple[str, str] | None = None


def read_info(folder: Path) -> AdapterInfo | None:
    """The adapter's `tunesmith.json`, or None for an adapter that another tool made.

    Raises:
        ModelError: The file is there but broken.
    """
    file = folder / INFO
    if not file.is_file():
        return None
    content = _read_json(file)
    known = {item.name: content[item.name] for item in fields(AdapterInfo) if item.name in content}
    if known.get("identity") is not None:
        known["identity"] = tuple(known["identity"])
    try:
        return AdapterInfo(**known)
    except TypeError as error:
        raise _broken(file, error) from error


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """PEFT's `adapter_config.json`.

    Raises:
        ModelError: It is missing, broken, not LoRA, or names code to import.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise ModelError(t("{path} holds no adapter: {name} is missing.", path=folder, name=CONFIG))
    config = _read_json(file)
    if config.get("peft_type") != "LORA":
        raise ModelError(
            t(
                "{path} is an adapter of type {kind}; only LORA is supported.",
                path=folder,
                kind=config.get("peft_type"),
            )
        )
    library = (config.get("auto_mapping") or {}).get("parent_library", "transformers.")
    if config.get("megatron_config") or not str(library).startswith("transformers."):
        raise ModelError(
            t("{path} names code to import ({name}), which is refused.", path=file, name=library)
        )
    return config


def save_adapter(model: "PeftModel", folder: Path, info: AdapterInfo) -> None:
    """Write what PEFT saves and `tunesmith.json`; `folder` appears whole or not at all.

    The same weights give the same bytes, and no path of this machine is written.

    Raises:
        OSError: The disk is full or not writable.
    """
    with new_folder(folder) as part:
        with quiet():
            # "auto" would add the frozen embeddings themselves where LoRA is put on them.
            model.save_pretrained(str(part), save_embedding_layers=False)
        (part / "README.md").unlink(missing_ok=True)  # a blank form that names local paths
        config = _read_json(part / CONFIG)
        config["base_model_name_or_path"] = repository(info.base_name)
        if isinstance(config.get("target_modules"), list):
            config["target_modules"].sort()  # PEFT keeps a set, whose order changes between runs
        write_atomic(part / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        text = json.dumps(asdict(info), indent=2, ensure_ascii=False)
        write_atomic(part / INFO, text + "\n")


def check_adapter(folder: Path, model: LocalModel) -> tuple[str, ...]:
    """Refuse an adapter that is broken or belongs to another base; return what is only odd.

    Reads headers and scans the adapter's numbers; loads no model and no torch.

    Raises:
        ModelError: Pickled, lying or non-finite weights, or another base (both are named).
    """
    config = read_adapter_config(folder)
    info = read_info(folder)
    _check_base(folder, model, config, info)
    _check_finite(folder)
    return tuple(_differences(folder, model, info))


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors as its safetensors header lists them.

    Raises:
        ModelError: The weights are missing, pickled, or their header lies.
    """
    pickled = folder / "adapter_model.bin"
    if pickled.exists():
        raise ModelError(
            t(
                "{path} is a pickle, which can run code when it is read; save the adapter again "
                "as safetensors and delete this file.",
                path=pickled,
            )
        )
    if not (folder / WEIGHTS).is_file():
        raise ModelError(
            t("{path} holds no adapter: {name} is missing.", path=folder, name=WEIGHTS)
        )
    return safetensors_header(folder / WEIGHTS)


def read_values(file: Path, tensor: Tensor) -> "NDArray[np.float32]":
    """One tensor of a safetensors file in its shape, as float32.

    Raises:
        ModelError: It is not stored as floating point numbers.
    """
    import numpy as np

    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    if tensor.dtype not in kinds:
        raise ModelError(
            t("{path} holds {dtype} numbers; save it in float32.", path=file, dtype=tensor.dtype)
        )
    kind = np.dtype(kinds[tensor.dtype])
    count = (tensor.end - tensor.begin) // kind.itemsize
    values = np.fromfile(file, kind, count, offset=tensor.begin).reshape(tensor.shape)
    if tensor.dtype == "BF16":  # numpy has none: it is the upper half of a float32
        return (values.astype("<u4") << 16).view("<f4")
    return values.astype("<f4", copy=False)


def load_adapter(model: "PreTrainedModel", folder: Path, *, trainable: bool = False) -> "PeftModel":
    """The model with the adapter on it, through PEFT. Call `check_adapter` first.

    Raises:
        ModelError: PEFT cannot put this adapter on this model.
    """
    read_adapter_config(folder)
    adapter_tensors(folder)
    with quiet():
        from peft import PeftModel

        try:
            loaded: PeftModel = PeftModel.from_pretrained(
                model, str(folder), is_trainable=trainable, torch_device=str(model.device)
            )
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ModelError(
                t("{path} does not fit this model: {reason}", path=folder, reason=error)
            ) from error
    return loaded


def fingerprint(folder: Path) -> str:
    """The sha256 of an adapter's weights and config; equal adapters have equal ones."""
    digest = sha256()
    for name in (WEIGHTS, CONFIG):
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _check_base(
    folder: Path, model: LocalModel, config: dict[str, Any], info: AdapterInfo | None
) -> None:
    if info is None:
        made_for = str(config.get("base_model_name_or_path"))
        fits = not _misfits(adapter_tensors(folder), _base_shapes(model))
    else:
        made_for = f"{info.base_name} ({info.base_sha256[:12]})"
        fits = info.base_sha256 == model.sha256
    if not fits:
        raise ModelError(
            t(
                "The adapter {path} was made for {base}, not for {model}; "
                "use it with its own base model.",
                path=folder,
                base=made_for,
                model=f"{model.name} ({model.sha256[:12]})",
            )
        )


def _base_shapes(model: LocalModel) -> dict[str, tuple[int, ...]]:
    if not model.is_gguf:
        found = [safetensors_header(file).items() for file in weight_files(model.path)]
        return {name: tensor.shape for items in found for name, tensor in items}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in gguf_header(model.path).tensors.items():
        match name.split("."):
            case ["blk", layer, part, "weight"] if part in _GGUF_NAMES:
                shapes[f"model.layers.{layer}.{_GGUF_NAMES[part]}.weight"] = tensor.shape
    return shapes


def _misfits(adapter: dict[str, Tensor], base: dict[str, tuple[int, ...]]) -> bool:
    """Whether an A (r, in) or B (out, r) matrix contradicts its base weight (out, in)."""
    for name, tensor in adapter.items():
        module, _, part = name.removeprefix(_PREFIX).rpartition(".lora_")
        shape = base.get(f"{module}.weight")
        axis = {"A.weight": 1, "B.weight": 0}.get(part)
        if shape is None or axis is None:
            continue
        if len(tensor.shape) != 2 or tensor.shape[axis] != shape[axis]:
            return True
    return False


def _check_finite(folder: Path) -> None:
    import numpy as np

    file = folder / WEIGHTS
    for name, tensor in adapter_tensors(folder).items():
        if not np.isfinite(read_values(file, tensor)).all():
            raise ModelError(
                t(
                    "{path} holds NaN or infinity in {name}; the training that made it diverged, "
                    "so use an earlier checkpoint.",
                    path=file,
                    name=name,
                )
            )


def _differences(folder: Path, model: LocalModel, info: AdapterInfo | None) -> Iterator[str]:
    base = load_tokenizer(model)
    template, tokenizer = _trained_with(folder, info)
    if template is not None and template != base.template_sha256:
        yield t(
            "The adapter {path} was trained with another chat template than {model} has; "
            "answers may differ from training.",
            path=folder,
            model=model.name,
        )
    if tokenizer is not None and tokenizer != base.fingerprint:
        yield t(
            "The adapter {path} was trained with another tokenizer than {model} has; "
            "answers may be wrong.",
            path=folder,
            model=model.name,
        )


def _trained_with(folder: Path, info: AdapterInfo | None) -> tuple[str | None, str | None]:
    if info is not None:
        return info.template_sha256, info.tokenizer_sha256
    if not (folder / "tokenizer.json").is_file():
        return None, None
    shipped = read_tokenizer(folder)  # other tools save one beside the adapter
    return shipped.template_sha256, shipped.fingerprint


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _broken(file, error) from error
    if not isinstance(content, dict):
        raise _broken(file, t("not an object"))
    return content


def _broken(file: Path, reason: object) -> ModelError:
    return ModelError(
        t("{path} is broken ({reason}); use another copy of the adapter.", path=file, reason=reason)
    )
