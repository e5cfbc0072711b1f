"""The training loop: a generator of events over packs.

Everything random in step n follows from the seed and n, so a resumed run is the run itself.
"""

import math
import resource
import shutil
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from tunesmith import paths
from tunesmith.config import TrainSettings
from tunesmith.data.packs import Group, Sample, pack
from tunesmith.errors import RunError, TrainingError, TunesmithError
from tunesmith.language import t
from tunesmith.models.adapter import AdapterInfo, save_adapter
from tunesmith.models.plain import plain_lora
from tunesmith.runs import Run
from tunesmith.training import checkpoint
from tunesmith.training.checkpoint import Progress
from tunesmith.training.events import (
    Evaluated,
    Event,
    Failed,
    Finished,
    Saved,
    Shrunk,
    Started,
    Step,
)
from tunesmith.training.forward import arithmetic, pack_loss, prove_packing
from tunesmith.training.head import Head
from tunesmith.training.lora import trainable
from tunesmith.training.samples import Groups
from tunesmith.training.setup import Inputs, load, open_run, plan, read_inputs, replay_pairs

if TYPE_CHECKING:
    from peft import PeftModel

# These begin by moving a part of the base's weights into the adapter.
MOVES_THE_BASE = ("pissa", "olora")
EVALUATIONS = 10  # a run, unless eval_every says otherwise


def train(settings: TrainSettings, *, resume: bool = False) -> Iterator[Event]:
    """LoRA-tune a model as `settings` say, yielding what happens.

    With `resume`, go on from the newest checkpoint in `settings.out` that verifies.

    Raises:
        TunesmithError: What cannot be done, and why. Once the run folder exists, a `Failed` event
            comes before it.
    """
    inputs = read_inputs(settings)
    run = open_run(inputs, resume=resume)
    with run.lock():
        try:
            for event in _train(run, inputs):
                run.record(event)
                yield event
        except TunesmithError as error:
            path, _ = checkpoint.newest_checkpoint(run)
            failed = Failed(reason=str(error), checkpoint=path)
            with suppress(RunError):  # the disk may be what failed
                run.record(failed)
            yield failed
            raise


def _train(run: Run, inputs: Inputs) -> Iterator[Event]:
    settings = inputs.settings
    model = load(inputs)
    groups = Groups(inputs.data.train, (yield from replay_pairs(run, inputs, model)))
    optimizer = torch.optim.AdamW(
        trainable(model).values(), lr=0.0, weight_decay=settings.weight_decay, fused=True
    )
    planned = plan(inputs, model, groups)
    yield planned
    with arithmetic(model.get_base_model()):
        head = prove_packing(model.get_base_model(), [group[0] for group in groups[:2]])
    if settings.init_lora in MOVES_THE_BASE:
        save_adapter(model, run.initial, inputs.adapter_info)
    progress, notices = _resume(run, model, optimizer, settings)
    run.rewind(progress.step)
    yield Started(progress.step, tuple(notices))
    work = Work(
        settings, model, head, optimizer, groups, inputs.data.held_out, planned.steps,
        planned.learning_rate,
    )  # fmt: skip
    progress = yield from _loop(work, run, progress, inputs.adapter_info)
    yield _finish(run, progress, stopped_early=progress.step < planned.steps)


def _loop(
    work: "Work", run: Run, progress: Progress, info: AdapterInfo
) -> Generator[Event, None, Progress]:
    """Step, evaluate, save, until the last step or until patience ends."""
    if progress.step == 0 and work.held_out:
        yield Evaluated(0, work.held_out_loss(progress.micro_batch_size), best=False)
    while progress.step < work.steps and not work.out_of_patience(progress):
        step = progress.step + 1
        while (done := work.step(step, progress.micro_batch_size)) is None:
            progress = shrink(progress)
            yield Shrunk(step, progress.micro_batch_size)
        yield done
        progress = replace(progress, step=step)
        if work.evaluates_at(step):
            loss = work.held_out_loss(progress.micro_batch_size)
            progress = _compared(progress, loss)
            yield Evaluated(step, loss, best=progress.best_step == step)
        if work.saves_at(step) or progress.best_step == step:
            path = checkpoint.save_checkpoint(run, work.model, work.optimizer, progress, info)
            yield Saved(step, path)
    return progress


@dataclass(frozen=True)
class Work:
    """What the loop works with: the tuned model, head, optimizer and samples."""

    settings: TrainSettings
    model: "PeftModel"
    head: Head | None
    optimizer: torch.optim.Optimizer
    groups: Sequence[Group]
    held_out: Sequence[Sample]
    steps: int
    peak_rate: float

    def step(self, step: int, micro_batch_size: int) -> Step | None:
        """Do optimizer step `step` (from 1); None if memory ran out, and nothing has changed.

        Raises:
            TrainingError: The loss or the gradient is not a number.
        """
        begun = time.perf_counter()
        torch.manual_seed(self.settings.seed * 1_000_003 + step)
        groups = batch(self.groups, step, self.settings.batch_size, self.settings.seed)
        try:
            loss, unique = self._accumulate(groups, micro_batch_size)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            self.optimizer.zero_grad()
            return None
        rate = self.peak_rate * rate_factor(step, self.steps, self.settings)
        norm = self._update(rate)
        _require_finite(step, loss, norm)
        return Step(
            step=step,
            steps=self.steps,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens=sum(len(sample.input_ids) for group in groups for sample in group),
            unique_tokens=unique,
            seconds=time.perf_counter() - begun,
            memory=peak_memory(self.model.device),
        )

    def held_out_loss(self, micro_batch_size: int) -> float:
        """Mean loss over the held-out samples, in nats per trained token."""
        self.model.eval()
        weight = sum(sample.trained_tokens for sample in self.held_out)
        with torch.no_grad(), arithmetic(self.model.get_base_model()):
            pieces = _pieces([(sample,) for sample in self.held_out], micro_batch_size)
            return (
                sum(float(pack_loss(self.model, pack(piece), self.head)) for piece in pieces)
                / weight
            )

    def evaluates_at(self, step: int) -> bool:
        """Whether the held-out samples are looked at after this step."""
        every = self.settings.eval_every or math.ceil(self.steps / EVALUATIONS)
        return bool(self.held_out) and (step % every == 0 or step == self.steps)

    @property
    def evaluations(self) -> int:
        """How often a whole run looks at the held-out samples, the start included."""
        if not self.held_out:
            return 0
        return 1 + sum(map(self.evaluates_at, range(1, self.steps + 1)))

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due after this step, even if it is not the best."""
        every = self.settings.save_every or math.ceil(self.steps / EVALUATIONS)
        return step % every == 0 or step == self.steps

    def out_of_patience(self, progress: Progress) -> bool:
        """Whether the held-out loss has not improved for too long."""
        patience = self.settings.patience
        return patience is not None and progress.stale >= patience

    def _accumulate(self, groups: Sequence[Group], micro_batch_size: int) -> tuple[float, int]:
        """Backward over the step in pieces; returns the mean loss and the unique tokens.

        Of soft targets the loss is what lies above their own entropy: 0 where nothing moved.

        Each piece is weighted by the tokens of the whole step, so that pieces of any size give
        the same gradient.
        """
        self.model.train()
        samples = [sample for group in groups for sample in group]
        weight = sum(sample.trained_tokens for sample in samples)
        total, unique = -sum(sample.entropy for sample in samples) / weight, 0
        for piece in _pieces(groups, micro_batch_size):
            packed = pack(piece)
            with arithmetic(self.model.get_base_model()):
                loss = pack_loss(self.model, packed, self.head) / weight
            torch.autograd.backward(loss)
            total += float(loss.detach())
            unique += len(packed.tokens)
        return total, unique

    def _update(self, rate: float) -> float:
        """Clip, step, clear; returns the gradient's norm before clipping."""
        weights = trainable(self.model).values()
        limit = self.settings.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(weights, limit))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


def batch(groups: Sequence[Group], step: int, size: int, seed: int) -> list[Group]:
    """The groups of step `step` (from 1): the epochs' shuffled orders, one behind another."""
    count = len(groups)
    first = (step - 1) * size
    places = (divmod(place, count) for place in range(first, first + size))
    return [groups[int(_order(count, seed, epoch)[place])] for epoch, place in places]


def rate_factor(step: int, steps: int, settings: TrainSettings) -> float:
    """The learning rate of step `step` (from 1) as a share of its peak."""
    warmup = min(settings.warmup_steps, steps // 2)
    if step <= warmup:
        return step / warmup
    left = (steps - step + 1) / (steps - warmup)  # 1 at the first step after warm-up
    match settings.scheduler:
        case "constant":
            return 1.0
        case "linear":
            return left
        case "cosine":
            return 0.5 * (1 - math.cos(math.pi * left))


@lru_cache(maxsize=2)  # a step may lie in two epochs
def _order(count: int, seed: int, epoch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)


def _pieces(groups: Sequence[Group], size: int) -> Iterator[list[Sample]]:
    """Cut a step into pieces of `size` groups, alike ones together so that they can share."""
    ordered = sorted(groups, key=lambda group: group[0].input_ids)
    for start in range(0, len(ordered), size):
        yield [sample for group in ordered[start : start + size] for sample in group]


def _resume(
    run: Run, model: "PeftModel", optimizer: torch.optim.Optimizer, settings: TrainSettings
) -> tuple[Progress, list[str]]:
    path, notices = checkpoint.newest_checkpoint(run)
    if path is None:
        size = settings.micro_batch_size or settings.batch_size
        return Progress(micro_batch_size=min(size, settings.batch_size)), notices
    return checkpoint.load_checkpoint(path, model, optimizer), notices


def _compared(progress: Progress, loss: float) -> Progress:
    if progress.best_loss is None or loss < progress.best_loss:
        return replace(progress, best_loss=loss, best_step=progress.step, stale=0)
    return replace(progress, stale=progress.stale + 1)


def _finish(run: Run, progress: Progress, *, stopped_early: bool) -> Finished:
    best = checkpoint.best_adapter(run, progress)
    if run.initial.exists():
        plain_lora(best, run.initial, run.adapter)
    else:
        with paths.new_folder(run.adapter) as folder:
            shutil.copytree(best, folder, dirs_exist_ok=True)
    return Finished(progress.step, run.adapter, progress.best_loss, stopped_early)


def shrink(progress: Progress) -> Progress:
    """Go on in pieces of half the size.

    Raises:
        TrainingError: A piece is one sample already.
    """
    if progress.micro_batch_size == 1:
        raise TrainingError(
            t("Memory ran out on a single sample; lower --max-length, or add "
              "--gradient-checkpointing.")
        )  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return replace(progress, micro_batch_size=(progress.micro_batch_size + 1) // 2)


def _is_out_of_memory(error: BaseException) -> bool:
    """PyTorch's CPU allocator has no error class of its own."""
    named = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return named or "allocate memory" in str(error)


def _require_finite(step: int, loss: float, norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(
            t("Step {step}: the loss is {loss} and the gradient {norm}; checkpoints before it are "
              "kept. Lower --learning-rate and train into a new folder.",
              step=step, loss=loss, norm=norm)
        )  # fmt: skip


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
