"""Which engine runs a model here."""

from pathlib import Path
from typing import Literal

from tunesmith.engines.base import Engine
from tunesmith.errors import ModelError, UsageError
from tunesmith.language import t
from tunesmith.machine import cores
from tunesmith.models.store import LocalModel

EngineName = Literal["auto", "llama.cpp", "hf"]


def open_engine(
    model: LocalModel,
    adapter: Path | None = None,
    *,
    engine: EngineName = "auto",
    device: str = "auto",
    all_cores: bool = False,
) -> Engine:
    """Load `model`, and the adapter folder if given, in the engine asked for.

    "auto" is llama.cpp for a GGUF where there is no GPU, else transformers; an adapter that
    llama.cpp has no form for, such as DoRA, goes to transformers too. With `all_cores`, llama.cpp
    leaves none free: faster for many questions at once, slow beside a busy neighbour.

    Raises:
        UsageError: llama.cpp is asked for and the model is not a GGUF.
        ModelError: llama.cpp is asked for and has no form for the adapter.
        EngineError: The model does not load.
    """
    if engine == "llama.cpp" and not model.is_gguf:
        raise UsageError(
            t("llama.cpp needs a .gguf model, {name} is not one; use --engine hf.",
              name=model.name)
        )  # fmt: skip
    if engine == "llama.cpp" or (engine == "auto" and _suits_llama_cpp(model, device)):
        from tunesmith.engines.llama_cpp import LlamaCppEngine

        try:
            return LlamaCppEngine(model, adapter, threads=cores() if all_cores else None)
        except ModelError:
            if engine == "llama.cpp":
                raise
    from tunesmith.engines.hf import HfEngine

    return HfEngine(model, adapter, device=device)


def _suits_llama_cpp(model: LocalModel, device: str) -> bool:
    return model.is_gguf and device != "cuda" and not (device == "auto" and _has_gpu())


def _has_gpu() -> bool:
    """Whether an NVIDIA driver is here; asking PyTorch would take a second."""
    return Path("/proc/driver/nvidia/version").exists()
