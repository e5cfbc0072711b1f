"""Model weights on this machine, as a folder transformers reads and as a loaded model."""

import contextlib
import inspect
import io
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import ModelError
from tunesmith.language import t
from tunesmith.models.cache import made_once
from tunesmith.models.headers import GgufHeader, gguf_header
from tunesmith.models.quiet import quiet
from tunesmith.models.safety import check_files, code_allowed
from tunesmith.models.store import LocalModel
from tunesmith.models.tokenizer import tokenizer_folder
from tunesmith.paths import cache_dir

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def weights_folder(model: LocalModel) -> Path:
    """The model as a folder in the Hugging Face layout with safetensors weights.

    A GGUF is dequantised by transformers on first use and kept in the cache, its tokenizer beside
    it. Quantised weights become float32, which holds their values exactly.

    Raises:
        ModelError: The files are refused, the architecture is unknown, or the disk is too small.
    """
    check_files(model)
    if not model.is_gguf:
        return model.path
    return made_once(
        cache_dir() / "weights" / model.sha256, lambda folder: _dequantise(model, folder)
    )


def load_model(
    model: LocalModel,
    *,
    dtype: "torch.dtype",
    device: "str | torch.device" = "cpu",
    attention: str | None = None,
    nf4: bool = False,
) -> "PreTrainedModel":
    """The model in evaluation mode, its weights in `dtype` on `device`.

    Args:
        model: A model on this machine.
        dtype: What the weights are converted to while they are read.
        device: Where they go.
        attention: transformers' `attn_implementation`, such as "sdpa"; None lets it choose.
        nf4: Whether all linear layers but the head are packed into 4 bits, one by one as they
            are read, so that the model is never whole on `device`.

    Raises:
        ModelError: The files are refused, or transformers cannot load them.
    """
    folder = weights_folder(model)
    with quiet(), _explained(model.path):
        from transformers import AutoModelForCausalLM

        from tunesmith.models.nf4 import loading, take_over

        auto: Any = AutoModelForCausalLM
        loaded: Any = auto.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=code_allowed(model),
            **(loading(device) if nf4 else {}),
        )
        if nf4:
            take_over(loaded)
            _forget_quantisation(loaded)
        ready: PreTrainedModel = loaded.to(device).eval()
        return ready


def cache_name(model: "PreTrainedModel") -> str:
    """What its forward pass calls the keys and values it has seen: transformers is renaming it."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def _dequantise(model: LocalModel, folder: Path) -> None:
    path = model.path
    header = gguf_header(path)
    dtype = _storage_dtype(header)
    _check_space(path, folder, header, dtype)
    # The converter draws a progress bar that no setting turns off.
    with quiet(), _explained(path), contextlib.redirect_stderr(io.StringIO()):
        from transformers import AutoModelForCausalLM

        auto: Any = AutoModelForCausalLM
        loaded = auto.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, local_files_only=True
        )
        _forget_quantisation(loaded)
        loaded.save_pretrained(folder)
    shutil.copytree(tokenizer_folder(model), folder, dirs_exist_ok=True)


def _forget_quantisation(model: Any) -> None:
    # The weights are plain by now, or our own; with these left, transformers and PEFT refuse much.
    model.config.quantization_config = None
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = model.is_loaded_in_4bit = False


def _storage_dtype(header: GgufHeader) -> "torch.dtype":
    """The smallest dtype that holds every matrix exactly; norms were widened by the converter."""
    import torch

    kinds = {tensor.dtype for tensor in header.tensors.values() if len(tensor.shape) > 1}
    exact = {frozenset({"BF16"}): torch.bfloat16, frozenset({"F16"}): torch.float16}
    return exact.get(frozenset(kinds), torch.float32)


def _check_space(path: Path, folder: Path, header: GgufHeader, dtype: "torch.dtype") -> None:
    parameters = sum(prod(tensor.shape) for tensor in header.tensors.values())
    need, free = parameters * dtype.itemsize, shutil.disk_usage(folder).free
    if need > free:
        raise ModelError(
            t(
                "{path} takes {need:.1f} GB once unpacked, but {folder} has {free:.1f} GB free; "
                "make room, or set TUNESMITH_HOME to a larger disk.",
                path=path,
                need=need / 1e9,
                folder=folder.parent,
                free=free / 1e9,
            )
        )


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    failures = (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, ImportError)
    try:
        yield
    except (*failures, SafetensorError) as error:
        raise ModelError(
            t("transformers cannot load or unpack {path}: {reason}", path=path, reason=error)
        ) from error
