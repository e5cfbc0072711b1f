"""Random LoRA on a model, strong enough to change every answer."""

from typing import TYPE_CHECKING, Any

from tunesmith.models.store import LocalModel
from tunesmith.models.weights import load_model

if TYPE_CHECKING:
    from peft import PeftModel


def random_lora(
    model: LocalModel, *, strength: float = 1.0, seed: int = 0, **config: Any
) -> "PeftModel":
    """The model in float32 with LoRA whose A and B are both random; `config` goes to PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "init_lora_weights": False,
    }
    base = load_model(model, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tuned = get_peft_model(base, LoraConfig(**(settings | config)))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data.mul_(strength)
    return tuned.eval()
