"""transformers with PEFT: exact, general, and what every other engine is held to."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tunesmith.engines.base import Sampling, Stop, Tokens, check_prompt
from tunesmith.errors import EngineError, UsageError
from tunesmith.language import t
from tunesmith.machine import cores
from tunesmith.models.adapter import load_adapter
from tunesmith.models.store import LocalModel
from tunesmith.models.weights import cache_name, load_model

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


class HfEngine:
    """A model in this process, with a PEFT adapter if one is given.

    Args:
        model: A model on this machine; a GGUF is dequantised.
        adapter: An adapter folder that passed `check_adapter` for this model.
        device: "cpu", "cuda", "mps", or "auto" for a GPU if there is one.

    Raises:
        UsageError: The device is not here.
        ModelError: The files are refused, or transformers cannot load them.
    """

    name = "hf"

    def __init__(
        self, model: LocalModel, adapter: Path | None = None, *, device: str = "auto"
    ) -> None:
        self._device = _choose_device(device)
        loaded: Any = open_model(model, adapter, self._device)
        config = loaded.config.get_text_config()
        self.context_length: int = getattr(config, "max_position_embeddings", None) or 2**20
        self.has_adapter = adapter is not None
        self._cache_name = cache_name(loaded.get_base_model() if adapter else loaded)
        self._model = loaded
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        input_ids: Sequence[int],
        sampling: Sampling,
        *,
        stop_ids: frozenset[int],
        adapter: bool = True,
        stop: Stop | None = None,
    ) -> Tokens:
        """Yield new token ids; see `Engine.generate`."""
        import torch

        check_prompt(len(input_ids), self.context_length)
        generator = torch.Generator(self._device).manual_seed(sampling.seed)
        room = min(sampling.max_tokens, self.context_length - len(input_ids))
        cache = None
        unseen: Sequence[int] = input_ids
        for _ in range(room):
            logits, cache = self._forward(unseen, cache, adapter)
            id = choose(logits, sampling, generator)
            if id in stop_ids or (stop is not None and stop.asked):
                return "stop"
            yield id
            unseen = [id]
        return "length"

    def close(self) -> None:
        """Free the model; calling it twice does no harm."""
        with self._lock:
            self._model = None

    def _forward(self, ids: Sequence[int], cache: Any, adapter: bool) -> "tuple[torch.Tensor, Any]":
        """The logits (vocab_size,) after `ids`, and the grown cache."""
        import torch

        # Locked for one step only, so that answers of several callers advance side by side.
        with self._lock, self._threads(), torch.inference_mode(), self._adapter(adapter):
            more = {self._cache_name: cache} if cache is not None else {}
            output = self._model(
                input_ids=torch.tensor([ids], device=self._device),
                use_cache=True,
                logits_to_keep=1,
                **more,
            )
            return output.logits[0, -1].float(), getattr(output, self._cache_name)

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """One thread less than there are cores: each waits for all, at every one of 600 steps.

        Measured on 2 cores beside one busy process: 1.9 s a token with 2 threads, 0.06 s with 1.
        """
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(max(1, min(before, cores() - 1)))
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _adapter(self, on: bool) -> Any:
        if self._model is None:
            raise EngineError(t("The engine was closed; open the model again."))
        return self._model.disable_adapter() if self.has_adapter and not on else nullcontext()


def open_model(
    model: LocalModel, adapter: Path | None = None, device: str = "auto"
) -> "PreTrainedModel | PeftModel":
    """The model in evaluation mode, with the adapter on it; arguments and errors as `HfEngine`."""
    import torch

    place = _choose_device(device)
    # On a CPU without bfloat16 arithmetic, bfloat16 is thirty times slower than float32.
    dtype = torch.bfloat16 if place == "cuda" else torch.float32
    loaded = load_model(model, dtype=dtype, device=place)
    if adapter is None:
        return loaded
    tuned = load_adapter(loaded, adapter)
    tuned.eval()
    return tuned


def choose(logits: "torch.Tensor", sampling: Sampling, generator: "torch.Generator") -> int:
    """One id drawn from `logits` (vocab_size,) as `sampling` says."""
    import torch

    if sampling.temperature == 0:
        return int(logits.argmax())
    values, ids = (logits / sampling.temperature).softmax(-1).sort(descending=True)
    before = values.cumsum(-1) - values  # what the likelier ones hold; the first is always kept
    kept = values.where((before < sampling.top_p) | (before == 0), 0.0)
    return int(ids[torch.multinomial(kept, 1, generator=generator)])


def _choose_device(wanted: str) -> str:
    import torch

    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return next((name for name, usable in here.items() if usable), "cpu")
    if not here.get(wanted, wanted == "cpu"):
        raise UsageError(
            t("PyTorch finds no {device} device here; leave --device out.", device=wanted)
        )
    return wanted
