"""Layers compiled by PyTorch: what lies between the products becomes one kernel each."""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface

from tunesmith.config import TrainSettings
from tunesmith.errors import TrainingError
from tunesmith.language import t
from tunesmith.training.events import Planned
from tunesmith.training.forward import ATTENTION, packed_attention

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

COMPILE_FROM = 1e16  # tokens times parameters: minutes of work for a GPU of today


def compile_if_it_pays(settings: TrainSettings, model: "PeftModel", planned: Planned) -> None:
    """Compile the layers if asked to, or on a GPU if the training is long.

    Raises:
        TrainingError: It is asked for where it gains nothing.
    """
    can = model.device.type == "cuda" and find_spec("triton") is not None
    if settings.compile and not can:
        raise TrainingError(t("--compile is for a GPU that Triton knows; leave the flag out here."))
    tokens = planned.tokens / planned.samples * settings.batch_size * planned.steps
    pays = can and tokens * planned.total_parameters >= COMPILE_FROM
    if settings.compile or (settings.compile is None and pays):
        compile_layers(model)


def compile_layers(model: "PeftModel") -> None:
    """Compile a layer, once for all of them and for every length of a pack."""
    base: Any = model.get_base_model()
    outside: Any = torch.compiler.disable
    AttentionInterface.register(ATTENTION, outside(packed_attention))
    for layer in getattr(base, base.base_model_prefix).layers:
        layer.compile(dynamic=True)


def uncompiled(model: "PreTrainedModel") -> AbstractContextManager[Any]:
    """For a look without gradients, which is not worth another compilation."""
    if model.device.type != "cuda":
        return nullcontext()  # and PyTorch's compiler need not be imported
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
