"""Memory: what a pass takes, what there is, and how a step is cut so that it fits.

Between forward and backward each token of a pass keeps its activations. A layer that recomputes
keeps only its input, and costs another forward of its own; one that recomputes only its MLP's gate
and up keeps a third of what it kept, and costs half of that. So passes get shorter first, down to
where short ones lose speed. Only then do MLPs recompute, and after them whole layers, no more of
them than needed.
"""

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain, cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.config import TrainSettings
from tunesmith.data.packs import Pack, Sample, pack
from tunesmith.errors import TrainingError
from tunesmith.language import t
from tunesmith.training.checkpoint import Progress
from tunesmith.training.forward import arithmetic, pack_loss
from tunesmith.training.head import CHUNK_BYTES, COPIES, Head
from tunesmith.training.lora import trainable
from tunesmith.training.samples import Groups

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PROBE = {"cpu": 128, "cuda": 1024}  # tokens of the pass that is measured
SHORTEST_PROBE = 64  # of a shorter one, what is no token's would count too much
ENOUGH = {"cpu": 512, "cuda": 8192}  # shorter passes lose speed
PLENTY = {"cpu": 1024, "cuda": 16_384}  # longer ones gain none
FREE_SHARE = 0.9  # of what is free: the rest is for fragments, and for others
FRAGMENTED = {"cpu": 1.35, "cuda": 1.0}  # what malloc holds for what is kept; a GPU's is exact
GB = 10**9
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Needs:
    """Bytes that training takes.

    Attributes:
        fixed: Whatever a pass holds: weights, gradients, moments.
        head: What the head works with, a chunk of logits and its copies.
        token: What a token keeps for backward if nothing is recomputed.
        layer: How much less it keeps for each layer that recomputes.
        mlp: How much less for each that recomputes only in its MLP; 0 if none can.
    """

    fixed: float
    head: float
    token: float
    layer: float
    mlp: float = 0.0

    def peak(self, tokens: int, layers: int, mlps: int = 0) -> float:
        """Of a pass: beside what its tokens keep, first the head works, then layer after layer."""
        kept = tokens * self._kept(layers, mlps)
        return self.fixed + kept + max(self.head, tokens * 2 * self.layer)

    def tokens(self, available: float, layers: int, mlps: int = 0) -> int:
        """The longest pass that fits."""
        each = self._kept(layers, mlps)
        room = max(0.0, available - self.fixed)
        return int(min(max(0.0, room - self.head) / each, room / (each + 2 * self.layer)))

    def choose(
        self, available: float, *, enough: int, plenty: int, layers: tuple[int, int]
    ) -> tuple[int, int, int]:
        """Tokens of a pass, and layers and MLPs that recompute: the least to let `enough` fit.

        `layers` bounds how many layers do. Where not even the most let them, fewer tokens fit.
        """
        fewest, most = layers
        mlps = most if self.mlp and fewest < most else 0
        ways = [(fewest, count) for count in range(mlps)]
        ways += [(count, max(0, mlps - count)) for count in range(fewest, most + 1)]
        for way in ways:
            tokens = self.tokens(available, *way)
            if tokens >= enough:
                break
        return min(tokens, plenty), *way

    def _kept(self, layers: int, mlps: int) -> float:
        return self.token - layers * self.layer - mlps * self.mlp


def fit(
    settings: TrainSettings,
    model: "PeftModel",
    head: Head | None,
    groups: Groups,
) -> Progress:
    """How a run begins: with passes of how many tokens, and what is recomputed.

    Raises:
        TrainingError: Not even the longest group fits into `memory_gb`.
    """
    kind = "cuda" if model.device.type == "cuda" else "cpu"
    wanted, limit = settings.micro_batch_tokens, settings.memory_gb
    bounds = _layers_to_recompute(settings, len(layers_of(model)))
    if wanted is not None and bounds[0] == bounds[1]:
        return Progress(micro_batch_tokens=wanted, recomputed_layers=bounds[0])
    longest, step = groups.longest, groups.tokens * settings.batch_size // len(groups)
    enough = max(longest, wanted or min(ENOUGH[kind], step))
    plenty = max(longest, wanted or PLENTY[kind])
    needs = _measured(model, head, groups, bounds[0])
    available = available_memory(model.device, limit)
    if bounds[0] != bounds[1] and needs.tokens(available, 0) < enough:
        needs = _measured(model, head, groups, bounds[1])
    tokens, recomputed, mlps = needs.choose(available, enough=enough, plenty=plenty, layers=bounds)
    if limit is not None and tokens < longest:
        raise TrainingError(
            t("The longest sample, {tokens:,} tokens, needs about {needed:.1f} GB, and "
              "--memory-gb {limit:g} leaves {available:.1f}; raise it, or lower --max-length.",
              tokens=longest, needed=needs.peak(longest, recomputed, mlps) / GB, limit=limit,
              available=available / GB)
        )  # fmt: skip
    return Progress(
        micro_batch_tokens=wanted or max(tokens, longest),
        recomputed_layers=recomputed,
        recomputed_mlps=mlps,
    )


def measure(model: "PeftModel", head: Head | None, packed: Pack, most: int) -> Needs:
    """Run a pass forward, with `most` layers recomputed and with none, and see what it keeps.

    With `most` 0 that is not known of a layer, and taken to be its share of all.
    """
    model.train()

    def kept(layers: int, mlps: int = 0) -> float:
        recompute_activations(model, layers, mlps)
        with arithmetic(model.get_base_model()):
            bytes_kept = _kept(model, lambda: pack_loss(model, packed, head))
        return bytes_kept / len(packed.tokens)

    if model.device.type == "cuda":
        kept(0)  # a first pass also makes what stays: workspaces, kernels
    token, mlp = kept(0), 0.0
    if most:
        layer = (token - kept(most) - _unseen(model, most)) / most
        if any(map(mlps_of, layers_of(model))):
            mlp = (token - kept(0, most)) / most
    else:
        layer = token / max(1, len(layers_of(model)))
    recompute_activations(model, 0)
    trained = sum(weight.nbytes for weight in trainable(model).values())
    kind = "cuda" if model.device.type == "cuda" else "cpu"
    return Needs(
        fixed=used_memory(model.device) + 3 * trained,  # gradients and two moments
        head=COPIES * CHUNK_BYTES[kind] if head is None else head.working_bytes,
        token=FRAGMENTED[kind] * token,
        layer=FRAGMENTED[kind] * max(0.0, layer),
        mlp=FRAGMENTED[kind] * max(0.0, mlp),
    )


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that can recompute their activations, from the first on."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]


def mlps_of(layer: torch.nn.Module) -> list[Any]:
    """The MLPs that can compute gate and up again: they have an attribute `recomputes`."""
    return [part for part in layer.modules() if part is not layer and hasattr(part, "recomputes")]


def recompute_activations(model: "PeftModel | PreTrainedModel", count: int, mlps: int = 0) -> None:
    """Let the first `count` layers keep only their input and compute the rest again in backward.

    The first, since in backward they come last, when the others have let go of what they kept. The
    next `mlps` layers compute only gate and up again, if theirs can.
    """
    for number, layer in enumerate(layers_of(model)):
        own: Any = type(layer)
        if not issubclass(own, Recomputing):
            layer.__class__ = _recomputing(own)
            layer.draws = _draws(layer)  # type: ignore[assignment]
        layer.recomputes = number < count  # type: ignore[assignment]
        for mlp in mlps_of(layer):
            mlp.recomputes = 0 <= number - count < mlps


class Recomputing(nn.Module):
    """Before a layer's own class in the order of its classes: keeps only its input, if asked to.

    It does so around a compiled layer, not within: there it would keep PyTorch from compiling.
    """

    recomputes = False
    draws = True  # something is dropped out by chance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer says."""
        own = super().__call__
        if not (self.recomputes and torch.is_grad_enabled()):
            return own(*args, **kwargs)
        return checkpoint(own, *args, use_reentrant=False, preserve_rng_state=self.draws, **kwargs)


@cache
def _recomputing(own: Any) -> Any:
    return type(own.__name__, (Recomputing, own), {})


def _draws(layer: nn.Module) -> bool:
    numbers = ((name, one) for part in layer.modules() for name, one in vars(part).items())
    return any(one for name, one in numbers if name == "p" or name.endswith("dropout"))


def limit_memory(device: torch.device, limit_gb: float | None) -> None:
    """Tell a GPU's allocator how much it may take; a process's memory has no such limit."""
    if device.type == "cuda":
        _, whole = torch.cuda.mem_get_info(device)
        share = 1.0 if limit_gb is None else min(1.0, limit_gb * GB / whole)
        torch.cuda.set_per_process_memory_fraction(share, device)


def available_memory(device: torch.device, limit_gb: float | None) -> float:
    """Bytes that training may use in all, what it uses already included."""
    free: float
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = min(psutil.virtual_memory().available, _free_in_container())
    used = used_memory(device)
    if limit_gb is not None:
        free = min(free, limit_gb * GB - used)
    return used + FREE_SHARE * free


def used_memory(device: torch.device) -> int:
    """Bytes in use now: of the GPU's allocator, else of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    used: int = psutil.Process().memory_info().rss
    return used


def peak_memory(device: torch.device) -> int:
    """Bytes in use at most so far: of the GPU's allocator, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch's CPU allocator has no error class of its own."""
    named = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return named or "allocate memory" in str(error)


@contextmanager
def telling_of_memory() -> Iterator[None]:
    """Say in a sentence that memory ran out where nothing could be made smaller.

    Raises:
        TrainingError: It did.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            t("Memory ran out outside of a step, where no pass can be made smaller; give it more "
              "(--memory-gb, if that is set), or take a smaller model or --base-dtype nf4.")
        ) from error  # fmt: skip


def _layers_to_recompute(settings: TrainSettings, count: int) -> tuple[int, int]:
    match settings.gradient_checkpointing:
        case None:
            return 0, count
        case True:
            return count, count
        case False:
            return 0, 0


def _measured(model: "PeftModel", head: Head | None, groups: Groups, most: int) -> Needs:
    """`measure` over a pass as long as fits: nothing is recomputed in it yet."""
    tokens = PROBE["cuda" if model.device.type == "cuda" else "cpu"]
    while True:
        try:
            return measure(model, head, _probe(groups, tokens), most)
        except torch.OutOfMemoryError:
            if tokens <= SHORTEST_PROBE:
                raise
        torch.cuda.empty_cache()
        tokens //= 2


def _probe(groups: Groups, tokens: int) -> Pack:
    """A pass of tokens from the data, the last one a target: the head's part is no layer's."""
    samples = (sample for place in cycle(range(len(groups))) for sample in groups[place])
    row = tuple(islice(chain.from_iterable(one.input_ids for one in samples), tokens))
    return pack([Sample(row, (False,) * (len(row) - 1) + (True,))])


def _kept(model: "PeftModel", forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps until its backward."""
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated(model.device)
        loss = forward()
        return torch.cuda.memory_allocated(model.device) - before
    own = {one.untyped_storage().data_ptr() for one in chain(model.parameters(), model.buffers())}
    kept: dict[int, int] = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        loss = forward()  # noqa: F841  # what it keeps must live to be counted
    return sum(kept.values())


def _unseen(model: "PeftModel", recomputed: int) -> float:
    """Bytes of a token in layers that recompute, their inputs, which a CPU's count leaves out."""
    if model.device.type == "cuda":
        return 0.0
    base = model.get_base_model()
    width: int = base.config.hidden_size
    return float(recomputed * width * base.dtype.itemsize)


def _free_in_container() -> float:
    """Bytes that the limit of a container leaves; infinite where there is none."""
    try:
        limit = float((CGROUP / "memory.max").read_text("utf-8"))
        used = float((CGROUP / "memory.current").read_text("utf-8"))
        kinds = (CGROUP / "memory.stat").read_text("utf-8").splitlines()
    except (OSError, ValueError):  # none, or "max"
        return float("inf")
    cached = next((float(one.split()[1]) for one in kinds if one.startswith("inactive_file ")), 0.0)
    return float(limit - used + cached)
