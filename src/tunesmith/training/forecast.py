"""What a training will take, from a few of its own steps done on a model that is thrown away."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from tunesmith.config import TrainSettings
from tunesmith.data.packs import Group
from tunesmith.data.passes import passes, unique_tokens
from tunesmith.runs import Run
from tunesmith.training.checkpoint import Progress, save_checkpoint
from tunesmith.training.compiled import compile_if_it_pays
from tunesmith.training.drift import Probe
from tunesmith.training.events import Planned, Replaying, Shrunk
from tunesmith.training.forward import arithmetic, prove_packing
from tunesmith.training.lora import trainable
from tunesmith.training.memory import (
    fit,
    peak_memory,
    recompute_activations,
    telling_of_memory,
)
from tunesmith.training.replay import AT_ONCE, make_replay, read_replay
from tunesmith.training.samples import Groups
from tunesmith.training.setup import (
    Inputs,
    known_answers,
    load,
    mixed_in,
    narrow_base,
    neutral_answers,
    plan,
    read_inputs,
)
from tunesmith.training.train import Work

if TYPE_CHECKING:
    from peft import PeftModel

TIMED = 5  # steps at least, after those that warm up
TIMED_SECONDS = 10.0  # as many more as fit into it
LOOKED_AT = 200  # steps whose tokens are counted
AGAIN_BELOW = 3.0  # seconds: what takes less is done twice
GROWTH = {"cpu": 1.06}  # of a heap after these steps: passes of other lengths leave more holes


@dataclass(frozen=True)
class Forecast:
    """What the whole training takes; times in seconds, memory in bytes.

    `seconds` is everything to the adapter, and lies between `low` and `high` if the steps that
    were timed are typical. `memory` is the peak of the GPU's, else of the process's and a little
    more, since a few steps do not show all.
    """

    seconds: float
    low: float
    high: float
    step_seconds: float
    tokens_per_second: float
    memory: int


def forecast(
    settings: TrainSettings, *, before: float = 0.0
) -> Iterator[Replaying | Planned | Shrunk | Forecast]:
    """Do a few steps of the training and tell what all of them take. Nothing is kept.

    The step with the largest pass is among them, so that the memory is the whole training's.
    `before` is what the training takes before it reads the data, such as imports, in seconds.

    Raises:
        TunesmithError: Whatever would keep the training itself from beginning.
    """
    with telling_of_memory():
        yield from _forecast(settings, before)


def _forecast(
    settings: TrainSettings, before: float
) -> Iterator[Replaying | Planned | Shrunk | Forecast]:
    begun = time.perf_counter()
    inputs = read_inputs(settings)
    model = load(inputs)
    opening = before + time.perf_counter() - begun
    replayed, replaying = yield from _replay(inputs, model)
    begun = time.perf_counter()
    with TemporaryDirectory() as folder:
        asked = yield from neutral_answers(Run(Path(folder)), inputs, model)
    groups = Groups(inputs.data.train, replayed)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.0, fused=True)
    with arithmetic(model.get_base_model()):
        head = prove_packing(model.get_base_model(), [group[0] for group in groups[:2]])
    narrow_base(settings, model)
    probe = Probe(model, head, asked) if asked else None
    progress = fit(settings, model, head, groups)
    recompute_activations(model, progress.recomputed_layers, progress.recomputed_mlps)
    planned = plan(inputs, model, groups, progress)
    yield planned
    compile_if_it_pays(settings, model, planned)
    opening += time.perf_counter() - begun
    work = Work(
        settings, model, head, optimizer, groups, inputs.data.held_out, planned.steps,
        planned.learning_rate, probe,
    )  # fmt: skip
    looked_at = _spread(work.steps, LOOKED_AT)
    progress, first = yield from _warmed_up(work, progress, looked_at)
    timed = _timed(work, progress, looked_at)
    apart = opening + replaying + first.beyond(sum(timed) / len(timed))
    apart += _evaluating(work, progress) + _saving(work, progress, inputs)
    mean = sum(_unique(work, step) for step in looked_at) / len(looked_at)
    low, middle, high = (
        apart + work.steps * mean * rate
        for rate in (min(timed), sum(timed) / len(timed), max(timed))
    )
    step_seconds = (middle - apart) / work.steps
    yield Forecast(
        seconds=middle,
        low=low,
        high=high,
        step_seconds=step_seconds,
        tokens_per_second=planned.tokens / len(groups) * settings.batch_size / step_seconds,
        memory=round(peak_memory(model.device) * GROWTH.get(model.device.type, 1.0)),
    )


def _replay(
    inputs: Inputs, model: "PeftModel"
) -> Generator[Replaying, None, tuple[list[Group], float]]:
    """The first answers of the base, repeated to as many as there will be; and the time of all.

    None is asked again that is known from an earlier run.
    """
    count = len(inputs.neutral_questions)
    if count == 0:
        return [], 0.0
    known = read_replay(known_answers(inputs.neutral_questions, inputs, model))
    if known is not None:
        return mixed_in(inputs, known), 0.0
    begun = time.perf_counter()
    probed = min(count, AT_ONCE)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "replay.safetensors"
        asked = inputs.neutral_questions[:probed]
        yield from make_replay(model, inputs.renderer, inputs.data, asked, file)
        pairs = read_replay(file) or []
    seconds = (time.perf_counter() - begun) * count / probed
    groups = cycle(mixed_in(inputs, pairs))
    return list(islice(groups, round(count * len(pairs) / probed))), seconds


def _spread(steps: int, most: int) -> list[int]:
    """At most so many of the steps, from all of the training, in an order of no meaning."""
    count = min(steps, most)
    chosen = [1 + (steps - 1) * place // max(1, count - 1) for place in range(count)]
    Random(0).shuffle(chosen)
    return chosen


def _unique(work: Work, step: int) -> int:
    return unique_tokens(work.batch(step))


@dataclass(frozen=True)
class _First:
    """What the first steps took: compiling and all else that is done once is among it."""

    seconds: float
    unique_tokens: int

    def beyond(self, rate: float) -> float:
        """Seconds that later steps do not take, at so many for each unique token."""
        return max(0.0, self.seconds - rate * self.unique_tokens)


def _warmed_up(
    work: Work, progress: Progress, steps: Sequence[int]
) -> Generator[Shrunk, None, tuple[Progress, _First]]:
    """Do the smallest step, that with the largest pass and that with most tokens; their passes.

    In this order, since a heap in which small passes have been takes more for large ones. And what
    compiles may do so again at its second length.
    """

    def largest(step: int) -> int:
        every = passes(work.batch(step), progress.micro_batch_tokens)
        return max(unique_tokens([(sample,) for sample in samples]) for samples in every)

    tokens = {step: _unique(work, step) for step in steps}
    most = max(steps, key=tokens.__getitem__)
    ends = dict.fromkeys((min(steps, key=tokens.__getitem__), max(steps, key=largest), most))
    begun = time.perf_counter()
    for step in ends:
        while work.step(step, progress.micro_batch_tokens) is None:
            progress = work.shrink(step, progress)
            yield Shrunk(step, progress.micro_batch_tokens, progress.recomputed_layers)
    seconds = time.perf_counter() - begun
    return progress, _First(seconds, sum(tokens[step] for step in ends))


def _timed(work: Work, progress: Progress, steps: Sequence[int]) -> list[float]:
    """Seconds for each unique token, of some steps.

    The slowest and the fastest fifth are left out: they tell of what else the machine did.
    """
    rates: list[float] = []
    begun = time.perf_counter()
    for step in cycle(steps):
        if len(rates) >= TIMED and time.perf_counter() - begun > TIMED_SECONDS:
            break
        if len(rates) >= max(TIMED, len(steps)):
            break
        done = work.step(step, progress.micro_batch_tokens)
        if done is not None:
            rates.append(done.seconds / _unique(work, step))
    out = len(rates) // 5
    return sorted(rates)[out : len(rates) - out]


def _evaluating(work: Work, progress: Progress) -> float:
    """Seconds of all looks at the held-out samples."""
    return _often(work.evaluations, lambda: work.look(0, progress.micro_batch_tokens))


def _saving(work: Work, progress: Progress, inputs: Inputs) -> float:
    """Seconds of all checkpoints."""
    with TemporaryDirectory() as folder:
        run = Run(Path(folder))
        return _often(
            sum(map(work.saves_at, range(1, work.steps + 1))),
            lambda: save_checkpoint(run, work.model, work.optimizer, progress, inputs.adapter_info),
        )


def _often(times: int, act: Callable[[], object]) -> float:
    """Seconds that it takes to act so often; the first time, if short, is not like the others."""
    taken: list[float] = []
    while len(taken) < min(times, 2) and sum(taken) < AGAIN_BELOW:
        begun = time.perf_counter()
        act()
        taken.append(time.perf_counter() - begun)
    return sum(taken) + (times - len(taken)) * taken[-1] if taken else 0.0
