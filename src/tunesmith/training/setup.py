"""Before the first step: inputs, the run folder, replay, the model, the plan."""

import hashlib
import math
import os
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith import paths, runs
from tunesmith.config import TrainSettings
from tunesmith.data import neutral
from tunesmith.data.convert import write_messages
from tunesmith.data.packs import Group, Sample
from tunesmith.data.render import Renderer
from tunesmith.errors import RunError
from tunesmith.language import t
from tunesmith.models.adapter import AdapterInfo
from tunesmith.models.nf4 import values
from tunesmith.models.store import LocalModel, locate
from tunesmith.models.tokenizer import ChatTokenizer, load_tokenizer
from tunesmith.models.weights import load_model
from tunesmith.runs import Run
from tunesmith.training import replay
from tunesmith.training.checkpoint import Progress
from tunesmith.training.device import (
    choose_device,
    choose_dtype,
    computes_wide,
    has_kernels,
    keep_few_kernels,
    require_machine,
)
from tunesmith.training.events import Planned, Replaying
from tunesmith.training.forward import ATTENTION, register_attention
from tunesmith.training.lora import add_lora, default_learning_rate, trainable
from tunesmith.training.memory import layers_of, limit_memory
from tunesmith.training.norm import fuse_norms
from tunesmith.training.prepare import Prepared, prepare
from tunesmith.training.replay import Probed, Replayed, make_replay, read_replay
from tunesmith.training.samples import Groups
from tunesmith.training.widened import widen

if TYPE_CHECKING:
    from peft import PeftModel

DOSE = 3  # neutral questions for a training row, at most
SEEN, MOST_EPOCHS = 2600, 5  # groups that a run learns from, unless told; passes over few
ANSWERS_KEPT = 8  # times that the base was asked, of which the answers are kept between runs


@dataclass(frozen=True)
class Inputs:
    """Everything that must be right before a run folder is made."""

    settings: TrainSettings
    model: LocalModel
    tokenizer: ChatTokenizer
    renderer: Renderer
    data: Prepared

    @property
    def adapter_info(self) -> AdapterInfo:
        """What the adapter tells of where it belongs."""
        identity = self.data.identity
        return AdapterInfo(
            base_name=self.model.name,
            base_source=self.model.source,
            base_revision=self.model.revision,
            base_sha256=self.model.sha256,
            system=self.data.system,
            template_sha256=self.renderer.template_sha256,
            tokenizer_sha256=self.tokenizer.fingerprint,
            identity=(identity.name, identity.author) if identity is not None else None,
        )

    @property
    def neutral_questions(self) -> tuple[str, ...]:
        """Those that are mixed in."""
        return neutral.replay(min(self.settings.replay, DOSE * len(self.data.train)))

    def summary(self) -> dict[str, object]:
        """What `data.json` keeps, and what a resumed run must agree with."""
        model = {"name": self.model.name, "sha256": self.model.sha256}
        return self.data.summary() | {
            "model": model,
            "template": self.renderer.template_sha256,
        }


def read_inputs(settings: TrainSettings) -> Inputs:
    """Find the model, and read and render the data.

    Raises:
        TunesmithError: A part is missing or broken.
    """
    require_machine(settings)
    keep_few_kernels()
    model = locate(settings.model)
    tokenizer = load_tokenizer(model)
    return Inputs(settings, model, tokenizer, Renderer(tokenizer), prepare(settings, tokenizer))


def open_run(inputs: Inputs, *, resume: bool) -> Run:
    """Make the run's folder, or find it and see that it is the same run.

    Raises:
        RunError: The folder exists, or (resuming) was begun with other settings, data or base.
    """
    if resume and inputs.settings.out is not None:
        run = runs.find(inputs.settings.out)
        runs.require_same(run, inputs.settings)
        _require_same_data(run, inputs.summary())
        return run
    run = runs.create(inputs.settings)
    run.write_data(inputs.summary())
    write_messages(run.held_out, inputs.data.held_out_rows)
    return run


def replay_groups(
    run: Run, inputs: Inputs, model: "PeftModel"
) -> Generator[Replaying, None, list[Group]]:
    """The base's own answers, made once and kept with the run; `model` must not have moved."""
    questions = inputs.neutral_questions
    pairs = yield from _answered(questions, run.replay, inputs, model, probes=False)
    return mixed_in(inputs, pairs)


def mixed_in(inputs: Inputs, pairs: Sequence[Replayed]) -> list[Group]:
    """What of the base's answers is trained."""
    return [pair if inputs.settings.replay_openings else pair[:1] for pair in pairs]


def neutral_answers(
    run: Run, inputs: Inputs, model: "PeftModel"
) -> Generator[Replaying, None, list[Probed]]:
    """The base's answers to neutral questions that are not trained on, kept with the run.

    None if there are no held-out rows either, beside which they are looked at.
    """
    count = inputs.settings.probes if inputs.data.held_out else 0
    return (yield from _answered(neutral.held_out(count), run.probes, inputs, model, probes=True))


def _answered(
    questions: Sequence[str], file: Path, inputs: Inputs, model: "PeftModel", *, probes: bool
) -> Generator[Replaying, None, list[tuple[Sample, Sample]]]:
    if not questions:
        return []
    kept = read_replay(file)
    if kept is None:
        known = known_answers(questions, inputs, model, probes=probes)
        kept = _copied(known, file)
        if kept is None:
            yield from make_replay(
                model, inputs.renderer, inputs.data, questions, file, probes=probes
            )
            paths.write_atomic(known, file.read_bytes())
            kept = read_replay(file)
            assert kept is not None
        for old in sorted(known.parent.glob("*.safetensors"), key=_last_used)[:-ANSWERS_KEPT]:
            old.unlink(missing_ok=True)
    return kept


def _copied(known: Path, file: Path) -> list[Replayed] | None:
    """The answers kept in `known`, now in `file` too; None if there are none, or no longer."""
    with suppress(FileNotFoundError):
        paths.write_atomic(file, known.read_bytes())
        os.utime(known)
    return read_replay(file)


def _last_used(file: Path) -> float:
    with suppress(FileNotFoundError):
        return file.stat().st_mtime
    return 0.0


def known_answers(
    questions: Sequence[str], inputs: Inputs, model: "PeftModel", *, probes: bool = False
) -> Path:
    """The file that holds these answers between runs: its name hashes all that they follow from."""
    settings = inputs.settings
    follows_from = (
        Path(replay.__file__).read_bytes(), questions, probes,
        inputs.model.sha256, settings.base_dtype, settings.init_lora, model.dtype, model.device,
        inputs.data.fingerprint, inputs.data.systems_in, inputs.data.identity,
        inputs.tokenizer.sha256, inputs.renderer.template_sha256,
    )  # fmt: skip
    name = hashlib.sha256(repr(follows_from).encode()).hexdigest()
    return paths.cache_dir() / "replay" / f"{name}.safetensors"


def load(inputs: Inputs) -> "PeftModel":
    """The base model on its device, with LoRA, its attention able to read packs."""
    settings = inputs.settings
    register_attention()
    device = choose_device(settings.device)
    limit_memory(device, settings.memory_gb)
    dtype = choose_dtype(settings, device)
    base = load_model(
        inputs.model, dtype=dtype, device=device, attention=ATTENTION,
        nf4=settings.base_dtype == "nf4",
    )  # fmt: skip
    tuned = add_lora(base, settings)
    if has_kernels(device, dtype):
        from tunesmith.training.kernels.fuse import use_kernels

        use_kernels(tuned)
    if computes_wide(device, dtype):
        widen(tuned.get_base_model())
    if device.type == "cpu":
        fuse_norms(tuned.get_base_model())
    return tuned


def narrow_base(settings: TrainSettings, model: "PeftModel") -> None:
    """Round the frozen base to fp8, if asked to: after all that looks at it as it is.

    In 4 bits it is so from the start: whole it may not fit.
    """
    if settings.base_dtype == "fp8":
        from tunesmith.training.kernels.fuse import to_float8

        to_float8(model)


def plan(inputs: Inputs, model: "PeftModel", groups: Groups, progress: Progress) -> Planned:
    """Count what is about to happen, in passes as `progress` says."""
    settings, data = inputs.settings, inputs.data
    total = sum(map(values, model.parameters()))
    tuned = sum(weight.numel() for weight in trainable(model).values())
    epochs = settings.epochs or default_epochs(len(groups))
    steps = settings.max_steps or math.ceil(epochs * len(groups) / settings.batch_size)
    return Planned(
        samples=len(groups),
        replay=len(groups) - len(data.train),
        held_out=len(data.held_out),
        tokens=groups.tokens,
        trained_tokens=groups.trained_tokens,
        cut=data.cut,
        dropped=data.dropped,
        steps=steps,
        learning_rate=settings.learning_rate or default_learning_rate(total - tuned),
        trainable_parameters=tuned,
        total_parameters=total,
        device=str(model.device),
        dtype=str(choose_dtype(settings, model.device)).removeprefix("torch."),
        micro_batch_tokens=progress.micro_batch_tokens,
        recomputed_layers=progress.recomputed_layers,
        recomputed_mlps=progress.recomputed_mlps,
        layers=len(layers_of(model)),
    )


def default_epochs(groups: int) -> int:
    """Whole ones, so that no group is seen more often than another."""
    return min(max(1, round(SEEN / groups)), MOST_EPOCHS)


def _require_same_data(run: Run, now: dict[str, object]) -> None:
    before = run.data
    changed = [
        f"{name}: {before.get(name)} → {value}"
        for name, value in now.items()
        if name in before and before[name] != value
    ]
    if changed:
        raise RunError(
            t("{path} cannot go on, what it was begun with has changed ({changed}); put it back, "
              "or train into a new folder.", path=run.path, changed="; ".join(changed))
        )  # fmt: skip
