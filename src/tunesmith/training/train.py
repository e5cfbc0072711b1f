"""The training loop: a generator of events over packs.

Everything random in step n follows from the seed and n, so a resumed run is the run itself.
"""

import math
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from tunesmith import paths
from tunesmith.config import TrainSettings
from tunesmith.data.packs import Group, Pack, Sample, pack
from tunesmith.data.passes import passes, unique_tokens
from tunesmith.errors import RunError, TrainingError, TunesmithError
from tunesmith.language import t
from tunesmith.models.adapter import AdapterInfo, save_adapter
from tunesmith.models.plain import plain_lora
from tunesmith.runs import Run
from tunesmith.training import checkpoint
from tunesmith.training.checkpoint import Progress
from tunesmith.training.compiled import compile_if_it_pays, uncompiled
from tunesmith.training.device import MOVES_THE_BASE
from tunesmith.training.drift import Probe
from tunesmith.training.environment import environment
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
from tunesmith.training.fit import Pairings
from tunesmith.training.forward import arithmetic, pack_loss, prove_packing
from tunesmith.training.head import Head
from tunesmith.training.lora import trainable
from tunesmith.training.memory import (
    fit,
    is_out_of_memory,
    layers_of,
    peak_memory,
    recompute_activations,
    telling_of_memory,
)
from tunesmith.training.order import Order
from tunesmith.training.samples import Groups
from tunesmith.training.setup import (
    Inputs,
    load,
    narrow_base,
    neutral_answers,
    open_run,
    plan,
    read_inputs,
    replay_groups,
)

if TYPE_CHECKING:
    from peft import PeftModel

SAY_WHAT_FITS = ("micro_batch_tokens", "gradient_checkpointing", "memory_gb")
EVALUATIONS = 5  # a run, unless eval_every says otherwise; so they cost about a tenth of it
CHECKPOINTS = 10  # a run, unless save_every says otherwise


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
            with telling_of_memory():
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
    with arithmetic(model.get_base_model()):
        head = prove_packing(model.get_base_model(), inputs.data.train[:2])
    groups = Groups(inputs.data.train, (yield from replay_groups(run, inputs, model)))
    asked = yield from neutral_answers(run, inputs, model)
    optimizer = torch.optim.AdamW(
        trainable(model).values(),
        lr=0.0,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    narrow_base(settings, model)
    probe = Probe(model, head, asked) if asked else None
    if settings.init_lora in MOVES_THE_BASE:
        save_adapter(model, run.initial, inputs.adapter_info)
    progress, notices = _resume(run, model, optimizer)
    if progress is None or _other_passes(settings, run.settings):
        fitted = fit(settings, model, head, groups)
        progress = fitted if progress is None else progress.cut_as(fitted)
    recompute_activations(model, progress.recomputed_layers, progress.recomputed_mlps)
    planned = plan(inputs, model, groups, progress)
    yield planned
    compile_if_it_pays(settings, model, planned)
    run.rewind(progress.step)
    yield Started(progress.step, tuple(notices), environment(model.device))
    work = Work(
        settings, model, head, optimizer, groups, inputs.data.held_out, planned.steps,
        planned.learning_rate, probe,
    )  # fmt: skip
    progress = yield from _loop(work, run, progress, inputs.adapter_info)
    yield _finish(run, work, progress)


def _loop(
    work: "Work", run: Run, progress: Progress, info: AdapterInfo
) -> Generator[Event, None, Progress]:
    """Step, evaluate, save, until the last step or until patience ends."""
    if progress.step == 0 and work.held_out:
        yield (seen := work.look(0, progress.micro_batch_tokens))
        progress = progress.having_seen(seen.loss, seen.kl)
    while progress.step < work.steps and not work.out_of_patience(progress):
        step = progress.step + 1
        while (done := work.step(step, progress.micro_batch_tokens)) is None:
            progress = work.shrink(step, progress)
            yield Shrunk(step, progress.micro_batch_tokens, progress.recomputed_layers)
        yield done
        progress = replace(progress, step=step)
        if work.evaluates_at(step):
            seen = work.look(step, progress.micro_batch_tokens)
            progress = progress.having_seen(seen.loss, seen.kl)
            yield replace(seen, best=progress.best_step == step)
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
    groups: Groups
    held_out: Sequence[Sample]
    steps: int
    peak_rate: float
    probe: Probe | None = None
    _ahead: dict[tuple[int, int], list[Pack]] = field(default_factory=dict)

    def step(self, step: int, micro_batch_tokens: int) -> Step | None:
        """Do optimizer step `step` (from 1); None if memory ran out, and nothing has changed.

        Raises:
            TrainingError: The loss or the gradient is not a number.
        """
        begun = time.perf_counter()
        torch.manual_seed(self.settings.seed * 1_000_003 + step)
        groups = self.batch(step)
        try:
            loss, unique = self._accumulate(step, groups, micro_batch_tokens)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
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

    def batch(self, step: int) -> list[Group]:
        """The groups of a step."""
        return self._order.batch(step)

    @cached_property
    def _order(self) -> Order:
        settings = self.settings
        return Order(self.groups, self.groups.parts, settings.batch_size, settings.seed)

    def packs(self, step: int, micro_batch_tokens: int) -> list[Pack]:
        """The passes of a step, which may have been made during the one before."""
        made = self._ahead.pop((step, micro_batch_tokens), None)
        return made or [pack(some) for some in passes(self.batch(step), micro_batch_tokens)]

    def shrink(self, step: int, progress: Progress) -> Progress:
        """How to go on with a step for which memory ran out.

        Raises:
            TrainingError: Its longest group alone does not fit, however its layers are run.
        """
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        groups, layers = self.batch(step), len(layers_of(self.model))
        longest = max(unique_tokens([group]) for group in groups)
        tried = min(progress.micro_batch_tokens, unique_tokens(groups))
        if tried > longest:
            return replace(progress, micro_batch_tokens=max(longest, tried // 2))
        if progress.recomputed_layers < layers:
            recompute_activations(self.model, layers)
            return replace(progress, recomputed_layers=layers, recomputed_mlps=0)
        raise TrainingError(
            t("Memory ran out on a single sample of {tokens:,} tokens, its activations recomputed; "
              "lower --max-length.", tokens=longest)
        )  # fmt: skip

    def look(self, step: int, micro_batch_tokens: int) -> Evaluated:
        """What the model knows of held-out rows, and how far it has moved where it should not."""
        loss = self.mean_loss(self.held_out, micro_batch_tokens)
        if self.probe is None:
            return Evaluated(step, loss, best=False)
        drift = self.probe.drift(self.model)
        return Evaluated(step, loss, best=False, kl=drift.kl, agreement=drift.agreement)

    def fit(self, micro_batch_tokens: int) -> float | None:
        """By how many nats a token held-out answers are likelier after their own questions than
        after others'; None where no two answers differ (see `Pairings`)."""
        pairings = Pairings.of(self.held_out)
        if not pairings.own:
            return None
        own, others = (
            self.mean_loss(samples, micro_batch_tokens)
            for samples in (pairings.own, pairings.others)
        )
        return others - own

    def mean_loss(self, samples: Sequence[Sample], micro_batch_tokens: int) -> float:
        """Mean loss over samples that are not trained on, in nats per trained token."""
        self.model.eval()
        weight = sum(sample.trained_tokens for sample in samples)
        base = self.model.get_base_model()
        with torch.no_grad(), arithmetic(base), uncompiled(base):
            every = passes([(sample,) for sample in samples], micro_batch_tokens)
            losses = (pack_loss(self.model, pack(samples), self.head) for samples in every)
            return sum(map(float, losses)) / weight

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
        every = self.settings.save_every or math.ceil(self.steps / CHECKPOINTS)
        return step % every == 0 or step == self.steps

    def out_of_patience(self, progress: Progress) -> bool:
        """Whether the held-out loss has not improved for too long."""
        patience = self.settings.patience
        return patience is not None and progress.stale >= patience

    def _accumulate(
        self, step: int, groups: Sequence[Group], micro_batch_tokens: int
    ) -> tuple[float, int]:
        """Backward over the step in passes; returns the mean loss and the unique tokens.

        Of soft targets the loss is what lies above their own entropy: 0 where nothing moved.

        Each pass is weighted by the tokens of the whole step, so that passes of any size give
        the same gradient.
        """
        self.model.train()
        samples = [sample for group in groups for sample in group]
        weight = sum(sample.trained_tokens for sample in samples)
        losses, unique = [], 0
        for packed in self.packs(step, micro_batch_tokens):
            with arithmetic(self.model.get_base_model()):
                loss = pack_loss(self.model, packed, self.head) / weight
            torch.autograd.backward(loss)
            losses.append(loss.detach())  # read below, so that a GPU need not wait between passes
            unique += len(packed.tokens)
        self._ahead.clear()
        if step < self.steps:  # a GPU is still at work
            self._ahead[step + 1, micro_batch_tokens] = self.packs(step + 1, micro_batch_tokens)
        entropy = sum(sample.entropy for sample in samples) / weight
        return sum(map(float, losses)) - entropy, unique

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


def _resume(
    run: Run, model: "PeftModel", optimizer: torch.optim.Optimizer
) -> tuple[Progress | None, list[str]]:
    path, notices = checkpoint.newest_checkpoint(run)
    return checkpoint.load_checkpoint(path, model, optimizer) if path else None, notices


def _other_passes(now: TrainSettings, before: TrainSettings) -> bool:
    """Whether a resumed run is asked to cut its steps otherwise than it did."""
    return any(getattr(now, name) != getattr(before, name) for name in SAY_WHAT_FITS)


def _finish(run: Run, work: Work, progress: Progress) -> Finished:
    best = checkpoint.best_adapter(run, progress)
    if run.initial.exists():
        plain_lora(best, run.initial, run.adapter)
    else:
        with paths.new_folder(run.adapter) as folder:
            shutil.copytree(best, folder, dirs_exist_ok=True)
    return Finished(
        progress.step, run.adapter, progress.best_loss,
        stopped_early=progress.step < work.steps, fit=work.fit(progress.micro_batch_tokens),
    )  # fmt: skip


def _require_finite(step: int, loss: float, norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(
            t("Step {step}: the loss is {loss} and the gradient {norm}; checkpoints before it are "
              "kept. Lower --learning-rate and train into a new folder.",
              step=step, loss=loss, norm=norm)
        )  # fmt: skip
