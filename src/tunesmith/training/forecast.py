"""What a training will take, from a few of its own steps done on a model that is thrown away."""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from tunesmith.config import TrainSettings
from tunesmith.data.packs import Group
from tunesmith.training.checkpoint import Progress
from tunesmith.training.events import Planned, Replaying
from tunesmith.training.forward import arithmetic, prove_packing
from tunesmith.training.lora import trainable
from tunesmith.training.replay import AT_ONCE, make_replay, read_replay
from tunesmith.training.samples import Groups
from tunesmith.training.setup import Inputs, load, plan, read_inputs
from tunesmith.training.train import Work, batch, peak_memory, shrink

if TYPE_CHECKING:
    from peft import PeftModel

TIMED = 4  # steps, after one that warms up
LOOKED_AT = 1000  # steps among which the one with the most tokens is looked for


@dataclass(frozen=True)
class Forecast:
    """What the whole training takes; times in seconds, memory in bytes.

    `seconds` is everything from opening the model to the adapter, and lies between `low` and
    `high` if the steps that were timed are typical. `memory` is the peak of the GPU's, else of
    the process's.
    """

    seconds: float
    low: float
    high: float
    step_seconds: float
    tokens_per_second: float
    memory: int
    micro_batch_size: int


def forecast(settings: TrainSettings) -> Iterator[Replaying | Planned | Forecast]:
    """Do a few steps of the training and tell what all of them take. Nothing is written.

    The heaviest step is among them, so that the memory is the whole training's.

    Raises:
        TunesmithError: Whatever would keep the training itself from beginning.
    """
    begun = time.perf_counter()
    inputs = read_inputs(settings)
    model = load(inputs)
    opening = time.perf_counter() - begun
    replayed, replaying = yield from _replay(inputs, model)
    groups = Groups(inputs.data.train, replayed)
    planned = plan(inputs, model, groups)
    yield planned
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.0, fused=True)
    with arithmetic(model.get_base_model()):
        head = prove_packing(model.get_base_model(), [group[0] for group in groups[:2]])
    work = Work(
        settings, model, head, optimizer, groups, inputs.data.held_out, planned.steps,
        planned.learning_rate,
    )  # fmt: skip
    size, rates = _timed(work, _heaviest(work))
    evaluating = _evaluating(work, size) * work.evaluations
    tokens = planned.tokens / len(groups) * settings.batch_size * planned.steps
    low, middle, high = (
        opening + replaying + evaluating + tokens * rate
        for rate in (min(rates), sum(rates) / len(rates), max(rates))
    )
    rate = sum(rates) / len(rates)
    yield Forecast(
        seconds=middle,
        low=low,
        high=high,
        step_seconds=tokens * rate / planned.steps,
        tokens_per_second=1 / rate,
        memory=peak_memory(model.device),
        micro_batch_size=size,
    )


def _replay(
    inputs: Inputs, model: "PeftModel"
) -> Generator[Replaying, None, tuple[list[Group], float]]:
    """The first answers of the base, repeated to as many as there will be; and the time of all."""
    count = inputs.settings.replay
    if count == 0:
        return [], 0.0
    begun = time.perf_counter()
    probed = min(count, AT_ONCE)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "replay.safetensors"
        yield from make_replay(model, inputs.renderer, inputs.data, probed, file)
        pairs = read_replay(file) or []
    seconds = (time.perf_counter() - begun) * count / probed
    return list(islice(cycle(pairs), round(count * len(pairs) / probed))), seconds


def _heaviest(work: Work) -> int:
    """The step with the most tokens."""

    def tokens(step: int) -> int:
        groups = batch(work.groups, step, work.settings.batch_size, work.settings.seed)
        return sum(len(sample.input_ids) for group in groups for sample in group)

    return max(range(1, min(work.steps, LOOKED_AT) + 1), key=tokens)


def _timed(work: Work, heaviest: int) -> tuple[int, list[float]]:
    """In pieces of which size the steps fit into memory, and seconds per token of typical ones."""
    size = work.settings.micro_batch_size or work.settings.batch_size
    progress = Progress(micro_batch_size=min(size, work.settings.batch_size))
    while work.step(heaviest, progress.micro_batch_size) is None:
        progress = shrink(progress)
    chosen = [1 + (work.steps - 1) * part // TIMED for part in range(TIMED)]
    done = [work.step(step, progress.micro_batch_size) for step in chosen]
    return progress.micro_batch_size, [step.seconds / step.tokens for step in done if step]


def _evaluating(work: Work, micro_batch_size: int) -> float:
    """Seconds of one look at the held-out samples."""
    if not work.held_out:
        return 0.0
    begun = time.perf_counter()
    work.held_out_loss(micro_batch_size)
    return time.perf_counter() - begun
