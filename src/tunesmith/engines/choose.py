"""Which engine runs a model here."""

from pathlib import Path
from typing import Literal

from tunesmith.engines.base import Engine
from tunesmith.errors import UsageError
from tunesmith.language import t
from tunesmith.models.store import LocalModel

EngineName = Literal["auto", "llama.cpp", "hf"]


def open_engine(
    model: LocalModel,
    adapter: Path | None = None,
    *,
    engine: EngineName = "auto",
    device: str = "auto",
) -> Engine:
    """Load `model`, and the adapter folder if given, in the engine asked for.

    "auto" is llama.cpp for a GGUF where there is no GPU, else transformers.

    Raises:
        UsageError: llama.cpp is asked for and the model is not a GGUF.
        EngineError: The model does not load.
    """
    chosen = _choose(model, device) if engine == "auto" else engine
    if chosen == "llama.cpp":
        if not model.is_gguf:
            raise UsageError(
                t("llama.cpp needs a .gguf model, {name} is not one; use --engine hf.",
                  name=model.name)
            )  # fmt: skip
        from tunesmith.engines.llama_cpp import LlamaCppEngine

        return LlamaCppEngine(model, adapter)
    from tunesmith.engines.hf import HfEngine

    return HfEngine(model, adapter, device=device)


def _choose(model: LocalModel, device: str) -> EngineName:
    if not model.is_gguf or device == "cuda":
        return "hf"
    return "hf" if device == "auto" and _has_gpu() else "llama.cpp"


def _has_gpu() -> bool:
    """Whether an NVIDIA driver is here; asking PyTorch would take a second."""
    return Path("/proc/driver/nvidia/version").exists()
