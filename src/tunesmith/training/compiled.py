"""Layers compiled by PyTorch: what lies between the products becomes one kernel each."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface

from tunesmith.config import TrainSettings
from tunesmith.training.device import can_compile
from tunesmith.training.events import Planned
from tunesmith.training.forward import ATTENTION, by_lengths, packed_attention
from tunesmith.training.memory import layers_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

COMPILE_FROM = 1e16  # tokens times parameters: minutes of work for a GPU of today


def compile_if_it_pays(settings: TrainSettings, model: "PeftModel", planned: Planned) -> None:
    """Compile the layers if asked to, or on a GPU if the training is long."""
    tokens = planned.tokens / planned.samples * settings.batch_size * planned.steps
    pays = can_compile(model.device) and tokens * planned.total_parameters >= COMPILE_FROM
    if settings.compile or (settings.compile is None and pays):
        compile_layers(model)


def compile_layers(model: "PeftModel") -> None:
    """Compile a layer, once for all of them and for every length of a pack."""
    if not by_lengths(model.get_base_model()):
        outside: Any = torch.compiler.disable
        AttentionInterface.register(ATTENTION, outside(packed_attention))
    from torch._dynamo import config
    from torch.fx.experimental import _config as shapes

    # Else what is as long as something else in the first pack would be taken to be so in all.
    shapes.use_duck_shape = False
    # Else numbers such as a norm's epsilon would be inputs, computed with on the CPU.
    config.specialize_float = True
    # Else the first layer, to which nothing flows back, would be compiled apart.
    model.get_base_model().enable_input_require_grads()
    for layer in layers_of(model):
        layer.compile(dynamic=True)


def uncompiled(model: "PreTrainedModel") -> AbstractContextManager[Any]:
    """For a look without gradients, which is not worth another compilation."""
    if model.device.type != "cuda":
        return nullcontext()  # and PyTorch's compiler need not be imported
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
