"""What a model folder or file must not do: run code, unpickle, or lie about its size."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError
from tunesmith.language import t
from tunesmith.models.headers import gguf_header, safetensors_header
from tunesmith.models.store import LocalModel

ALLOW_CODE = "TUNESMITH_ALLOW_CODE"

_CONFIGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_COMMIT = re.compile(r"[0-9a-f]{40}")

# Any other name makes transformers fetch a kernel, which is code, from a hub.
_IMPLEMENTATIONS = {
    *("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4"),
    *("flex_attention", "grouped_mm", "batched_mm", None),
}


def check_files(model: LocalModel) -> None:
    """Refuse a model whose files are broken or not safe to load. Reads headers only.

    Raises:
        ModelError: Names the file, and what to do.
    """
    if not model.path.exists():
        raise ModelError(
            t("{path} is not there; pull the model again or give another path.", path=model.path)
        )
    if model.is_gguf:
        _check_gguf(model.path)
        return
    _check_layout(model.path)
    _check_code(model)
    for file in weight_files(model.path):
        safetensors_header(file)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files a model folder is loaded from.

    Raises:
        ModelError: There are none, or the index names a file that is missing or outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    whole = folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise _no_weights(folder)
    names = sorted(set(_index_map(index).values()))
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise ModelError(
            t(
                "{path} names {name}, which is not in its folder; download the model again.",
                path=index,
                name=missing[0],
            )
        )
    return [folder / name for name in names]


def repository(name: str) -> str:
    """`owner/name` of a model named `hf:owner/name@revision#file`; any other name as it is."""
    return re.split("[@#]", name)[0].removeprefix("hf:").removeprefix("modelscope:")


def code_allowed(model: LocalModel) -> bool:
    """Whether the user allowed this very repo, at this very commit, to run its own code.

    They do so with `TUNESMITH_ALLOW_CODE=hf:owner/name@COMMIT` (several: comma-separated). A branch
    or a tag can move to other code, so only a full commit hash counts.
    """
    repo = repository(model.name)
    entries = {entry.strip() for entry in os.environ.get(ALLOW_CODE, "").split(",")}
    pinned = _COMMIT.fullmatch(model.revision) is not None
    return pinned and f"{model.source}:{repo}@{model.revision}" in entries


def read_json(file: Path) -> Any:
    """What a model's JSON file holds.

    Raises:
        ModelError: It is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(
            t(
                "{path} is not valid JSON ({reason}); download the model again.",
                path=file,
                reason=error,
            )
        ) from error


def _check_gguf(path: Path) -> None:
    kind = gguf_header(path).metadata.get("general.type", "model")
    if kind != "model":
        raise ModelError(
            t(
                "{path} holds a {kind}, not a model; give the model it belongs to.",
                path=path,
                kind=kind,
            )
        )


def _check_layout(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            t("{path} is an adapter, not a model; give its base model and --adapter.", path=folder)
        )
    if not (folder / "config.json").is_file():
        raise ModelError(t("{path} has no config.json, so it is not a model folder.", path=folder))


def _check_code(model: LocalModel) -> None:
    for file, reason in _code(model.path):
        foreign = "--" in reason  # auto_map's "other/repo--module.Class"
        if foreign or not code_allowed(model):
            raise ModelError(
                t(
                    "{file} wants to run code of its own ({reason}). Use a model without custom "
                    "code or, if you have read that code and trust it, set "
                    "{variable}={source}:OWNER/NAME@COMMIT for this exact commit.",
                    file=file,
                    reason=reason,
                    variable=ALLOW_CODE,
                    source=model.source,
                )
            )


def _code(folder: Path) -> Iterator[tuple[Path, str]]:
    for name in _CONFIGS:
        file = folder / name
        if file.is_file():
            yield from ((file, reason) for reason in _code_fields(read_json(file)))
    for file in sorted(folder.rglob("*.py")):
        yield file, t("a Python file")


def _code_fields(config: Any) -> Iterator[str]:
    if isinstance(config, list):
        config = dict(enumerate(config))
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key == "auto_map":
            yield f"auto_map: {json.dumps(value)}"
        elif key == "transformers_weights" and not str(value).endswith(".safetensors"):
            yield f"transformers_weights: {json.dumps(value)}"
        elif str(key).removesuffix("_internal").endswith("_implementation"):
            values = list(value.values()) if isinstance(value, dict) else [value]
            yield from (f"{key}: {json.dumps(one)}" for one in values if not _known(one))
        else:
            yield from _code_fields(value)


def _known(implementation: Any) -> bool:
    return implementation is None or (
        isinstance(implementation, str) and implementation in _IMPLEMENTATIONS
    )


def _index_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError(
            t("{path} maps no weights to files; download the model again.", path=index)
        )
    return weight_map


def _no_weights(folder: Path) -> ModelError:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if pickles:
        return ModelError(
            t(
                "{path} has its weights only as {name}, a pickle, which can run code when it is "
                "read. Choose a revision or a copy of this model with .safetensors files.",
                path=folder,
                name=pickles[0],
            )
        )
    return ModelError(t("{path} holds no .safetensors weights.", path=folder))
