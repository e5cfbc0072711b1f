"""LoRA through PEFT: which weights are trained. PEFT owns the format and the variants."""

from typing import TYPE_CHECKING

import torch

from tunesmith.config import TrainSettings
from tunesmith.errors import TrainingError
from tunesmith.language import t
from tunesmith.training.fused import fuse_lora

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def add_lora(model: "PreTrainedModel", settings: TrainSettings) -> "PeftModel":
    """Freeze the model and put LoRA on its linear layers, initialised from the seed.

    Raises:
        TrainingError: None of the target names is a module of this model.
    """
    from peft import LoraConfig, get_peft_model

    targets = settings.lora_targets
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=True if settings.init_lora == "default" else settings.init_lora,
    )
    torch.manual_seed(settings.seed)
    try:
        tuned = get_peft_model(model, config)
    except ValueError as error:
        raise TrainingError(
            t("--lora-targets {targets} does not fit this model ({error}); its linear layers are "
              "{names}.", targets=" ".join(targets), error=str(error).split("\n")[0],
              names=", ".join(_linear_names(model)))
        ) from None  # fmt: skip
    for module in tuned.modules():
        # Autocast picks the arithmetic; PEFT's own cast would copy every input to float32 first.
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    fuse_lora(tuned)
    return tuned


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def default_learning_rate(parameters: int) -> float:
    """A peak rate for LoRA by model size: 2e-3 at 135M, 2e-4 at 7B, falling as N^-0.58."""
    rate = min(2e-3, max(5e-5, 2e-4 * (7e9 / parameters) ** 0.58))
    return float(f"{rate:.1e}")


def _linear_names(model: torch.nn.Module) -> list[str]:
    linear = (name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear))
    return sorted({name.rsplit(".", 1)[-1] for name in linear})
