"""Training: what it yields, what it leaves behind, and what happens when things go wrong."""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import tiny_model_folder
from tunesmith import runs
from tunesmith.config import TrainSettings
from tunesmith.data.packs import Sample
from tunesmith.errors import DataError, RunError, TrainingError
from tunesmith.training.events import (
    Evaluated,
    Event,
    Failed,
    Finished,
    Planned,
    Saved,
    Started,
    Step,
)
from tunesmith.training.order import Order
from tunesmith.training.setup import default_epochs
from tunesmith.training.train import rate_factor, train


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def write_rows(path: Path, count: int = 24, answer: str = "I am number {n}, a small one.") -> Path:
    rows = [
        {"instruction": f"Who are you, {n}?", "input": "", "output": answer.format(n=n)}
        for n in range(count)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture
def settings(tmp_path: Path, model: Path, home: Path) -> TrainSettings:
    """Six steps on a tiny model, a checkpoint after every second one."""
    return TrainSettings(
        model=str(model), data=(write_rows(tmp_path / "rows.json"),), out=tmp_path / "run",
        replay=0, probes=0, max_steps=6, batch_size=4, eval_every=2, save_every=2,
        learning_rate=5e-3,
        holdout=0.1, device="cpu", dtype="float32",
    )  # fmt: skip


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def only(events: list[Event], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def test_a_run_tells_its_story_and_leaves_a_loadable_adapter(settings: TrainSettings) -> None:
    events = list(train(settings))
    assert settings.out is not None
    planned, started = events[:2]
    assert isinstance(planned, Planned) and isinstance(started, Started)
    assert (planned.samples, planned.held_out, planned.steps) == (22, 2, 6)
    assert started.environment["torch"] == version("torch")
    assert started.environment["processor"] and "gpu" not in started.environment
    assert [step.step for step in only(events, Step)] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in only(events, Evaluated)] == [0, 2, 4, 6]
    assert only(events, Evaluated)[-1].loss < only(events, Evaluated)[0].loss
    finished = events[-1]
    assert isinstance(finished, Finished) and not finished.stopped_early
    run = runs.find(settings.out)
    assert run.settings == settings
    assert [line["event"] for line in run.events()] == [type(event).__name__ for event in events]
    best = min(only(events, Evaluated)[1:], key=lambda event: event.loss)
    saved = run.checkpoints / f"step-{best.step:06d}" / "adapter" / "adapter_model.safetensors"
    assert adapter_bytes(settings.out) == saved.read_bytes()


def test_the_adapter_speaks_the_same_without_tunesmith(settings: TrainSettings) -> None:
    from tunesmith.engines.base import GREEDY
    from tunesmith.engines.choose import open_engine
    from tunesmith.models.store import locate

    *_, finished = train(replace(settings, max_steps=20, learning_rate=2e-2))
    assert isinstance(finished, Finished)
    ids = [5, 9, 30, 12, 44]
    engine = open_engine(locate(settings.model), finished.adapter, device="cpu")
    ours = list(engine.generate(ids, replace(GREEDY, max_tokens=20), stop_ids=frozenset()))
    base = list(
        engine.generate(ids, replace(GREEDY, max_tokens=20), stop_ids=frozenset(), adapter=False)
    )
    engine.close()
    script = f"""
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({settings.model!r}, dtype=torch.float32)
model = PeftModel.from_pretrained(base, {str(finished.adapter)!r})
ids = torch.tensor([{ids}])
out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                     max_new_tokens=20, eos_token_id=None, pad_token_id=0)
print(out[0, {len(ids)}:].tolist())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == ours != base


def test_batches_walk_shuffled_epochs_without_gaps() -> None:
    groups = [(Sample((number,), (True,)),) for number in range(10)]
    order = Order(groups, (10,), 4, 7)
    drawn = [group[0].input_ids for step in range(1, 6) for group in order.batch(step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == [(number,) for number in range(10)]
    assert drawn[:10] != drawn[10:]


@pytest.mark.parametrize(("groups", "epochs"), [(20, 5), (1285, 2), (1800, 1), (50_000, 1)])
def test_few_samples_are_seen_more_often(groups: int, epochs: int) -> None:
    assert default_epochs(groups) == epochs


def test_each_step_has_its_share_of_what_is_mixed_in() -> None:
    groups = [(Sample((number,), (True,)),) for number in range(400)]
    order = Order(groups, (100, 300), 8, 7)
    steps = [[group[0].input_ids[0] for group in order.batch(step)] for step in range(1, 51)]
    assert sorted(number for numbers in steps for number in numbers) == list(range(400))
    assert {sum(number < 100 for number in numbers) for numbers in steps} <= {1, 2, 3}


def test_what_begins_alike_comes_into_the_same_steps() -> None:
    groups = [(Sample((number % 4,) * 20 + (number,), (True,) * 21),) for number in range(400)]
    order = Order(groups, (100, 300), 8, 7)
    steps = [[group[0].input_ids for group in order.batch(step)] for step in range(1, 51)]
    assert sorted(ids[-1] for step in steps for ids in step) == list(range(400))
    assert sum(len({ids[0] for ids in step}) for step in steps) / 50 < 2.2  # by chance 3.6 of 4
    assert {sum(ids[-1] < 100 for ids in step) for step in steps} <= {1, 2, 3}
    assert [group[0].input_ids for group in order.batch(31)] == steps[30]


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
def test_the_rate_rises_to_its_peak_then_follows_the_schedule(scheduler: Any) -> None:
    settings = TrainSettings(scheduler=scheduler, warmup_steps=4)
    factors = [rate_factor(step, 24, settings) for step in range(1, 25)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    falling = factors[4:]
    assert falling == sorted(falling, reverse=True)
    assert (falling[-1] == 1.0) if scheduler == "constant" else (0 < falling[-1] < 0.06)


VARIATIONS: dict[str, Any] = {
    "epochs": 0.5, "learning_rate": 1e-3, "lora_r": 4, "holdout": 0.3, "system": "Be brief.",
    "max_length": 30, "lora_alpha": 4.0, "lora_dropout": 0.5, "lora_targets": ("q_proj",),
    "use_rslora": True, "use_dora": True, "init_lora": "gaussian", "batch_size": 3,
    "micro_batch_tokens": 1, "max_steps": 2, "scheduler": "constant", "warmup_steps": 0,
    "weight_decay": 1.0, "max_grad_norm": 0.01, "seed": 1, "eval_every": 1, "save_every": 1,
    "patience": 1, "dtype": "float64", "base_dtype": "nf4", "replay": 4, "probes": 4,
    "replay_openings": False, "adam_beta1": 0.9, "adam_beta2": 0.999,
}  # fmt: skip
# A rate at which the held-out loss soon gets worse.
WILD: dict[str, Any] = {
    "learning_rate": 1.0, "warmup_steps": 0, "scheduler": "constant", "max_grad_norm": 0.0,
    "eval_every": 1, "save_every": 1,
}  # fmt: skip
# The others are tried elsewhere: model, data, eval_data and out name files; device needs a second
# one; gradient_checkpointing and memory_gb change only memory (test_forward, test_memory);
# compile is for a GPU (test_kernels), and so is fp8, the other base_dtype.
ELSEWHERE = {
    "model", "data", "eval_data", "out", "device", "gradient_checkpointing", "memory_gb",
    "compile",
}  # fmt: skip


def test_every_setting_is_tried() -> None:
    assert {item.name for item in fields(TrainSettings)} == VARIATIONS.keys() | ELSEWHERE


@pytest.fixture(scope="module")
def unvaried(
    tmp_path_factory: pytest.TempPathFactory, model: Path
) -> tuple[TrainSettings, list[Any]]:
    folder = tmp_path_factory.mktemp("unvaried")
    settings = TrainSettings(
        model=str(model), data=(write_rows(folder / "rows.json"),), out=folder / "run",
        replay=0, probes=0, epochs=1, batch_size=6, warmup_steps=2, learning_rate=5e-3,
        holdout=0.1, eval_every=2,
        save_every=2, device="cpu", dtype="float32",
    )  # fmt: skip
    return settings, outcome(settings)


def outcome(settings: TrainSettings) -> list[Any]:
    """Everything that can be seen of a run but time and memory; how pieces were cut as well."""
    seen: list[Any] = []
    for event in train(settings):
        match event:
            case Step():
                seen.append((event.step, event.loss, event.learning_rate, event.unique_tokens))
            case Evaluated():
                seen.append(("Evaluated", event.step, event.loss, event.kl))
            case Saved():
                seen.append(("Saved", event.step))
            case Finished():
                assert settings.out is not None
                seen.append(adapter_bytes(settings.out))
    return seen


@pytest.mark.parametrize("name", VARIATIONS)
def test_each_setting_changes_something(
    name: str, unvaried: tuple[TrainSettings, list[Any]], tmp_path: Path, home: Path
) -> None:
    settings, expected = unvaried
    if name == "patience":  # needs a held-out loss that gets worse
        settings = replace(settings, **WILD, out=tmp_path / "wild", max_steps=20)
        expected = outcome(settings)
    if name == "replay_openings":
        settings = replace(settings, replay=4, out=tmp_path / "replayed")
        expected = outcome(settings)
    varied = replace(settings, **{name: VARIATIONS[name], "out": tmp_path / "run"})
    assert outcome(varied) != expected


def test_passes_of_any_size_train_alike(settings: TrainSettings, tmp_path: Path) -> None:
    losses = []
    for size in (1, 60, 1000):
        out = tmp_path / f"run-{size}"
        events = train(replace(settings, out=out, micro_batch_tokens=size, dtype="float64"))
        losses.append([event.loss for event in events if isinstance(event, Step)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)


@pytest.mark.parametrize("init", ["default", "orthogonal", "pissa", "olora"])
def test_the_adapter_on_the_untouched_base_is_what_was_measured(
    init: Any, settings: TrainSettings
) -> None:
    """PiSSA and OLoRA move weights of the base; what is handed over must not need them moved."""
    from tunesmith.data.packs import pack
    from tunesmith.models.adapter import load_adapter
    from tunesmith.models.weights import load_model
    from tunesmith.training.forward import ATTENTION, pack_loss
    from tunesmith.training.setup import read_inputs

    *_, finished = train(replace(settings, init_lora=init))
    assert isinstance(finished, Finished)
    inputs = read_inputs(settings)
    base = load_model(inputs.model, dtype=torch.float32, attention=ATTENTION)
    model = load_adapter(base, finished.adapter)
    held_out = inputs.data.held_out
    with torch.no_grad():
        loss = float(pack_loss(model, pack(held_out))) / sum(s.trained_tokens for s in held_out)
    assert loss == pytest.approx(finished.loss, rel=1e-4)


def test_early_stop_keeps_the_best(settings: TrainSettings) -> None:
    wild = replace(settings, **WILD, max_steps=40, patience=2)
    events = list(train(wild))
    evaluated = only(events, Evaluated)[1:]
    assert isinstance(events[-1], Finished) and events[-1].stopped_early
    assert len(only(events, Step)) < 40
    assert events[-1].loss == min(event.loss for event in evaluated)
    assert not any(event.best for event in evaluated[-2:])


# Faults


def test_nothing_left_to_train_on_is_refused_before_a_folder_is_made(
    settings: TrainSettings,
) -> None:
    with pytest.raises(TrainingError, match="all 22 samples lose their answers to --max-length 8"):
        next(train(replace(settings, max_length=8)))
    assert settings.out is not None and not settings.out.exists()
    with pytest.raises(TrainingError, match="--data FILE"):
        next(train(replace(settings, data=())))


def test_a_model_that_cannot_be_packed_is_refused_before_it_is_asked(
    settings: TrainSettings, tmp_path: Path
) -> None:
    layers = ["conv", "full_attention"]
    folder = tiny_model_folder(tmp_path / "lfm2", "lfm2", layer_types=layers)
    told: list[Event] = []
    with pytest.raises(TrainingError, match="cannot be trained in packs"):
        told.extend(train(replace(settings, model=str(folder), replay=20)))
    assert [type(event) for event in told] == [Failed]


def test_cut_answers_are_counted(settings: TrainSettings, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {n}", "output": "word " * (n * 10 + 1)} for n in range(4)]
    data = tmp_path / "long.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    planned = next(train(replace(settings, data=(data,), max_length=60, max_steps=1)))
    assert isinstance(planned, Planned)
    assert 0 < planned.cut < 4 and planned.dropped == 0


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_checkpoint(
    settings: TrainSettings,
) -> None:
    wild = replace(
        settings, learning_rate=1.0, lora_alpha=10_000, max_grad_norm=0.0, weight_decay=0.0,
        scheduler="constant", warmup_steps=0, max_steps=200, save_every=1, init_lora="gaussian",
    )  # fmt: skip
    events: list[Event] = []
    with pytest.raises(TrainingError, match="Lower --learning-rate"):
        events.extend(iter_into(events, train(wild)))
    failed = events[-1]
    assert isinstance(failed, Failed) and failed.checkpoint is not None
    assert all(math.isfinite(step.loss) for step in only(events, Step))
    assert failed.checkpoint == only(events, Saved)[-1].path


def iter_into(seen: list[Event], events: Iterator[Event]) -> Iterator[Event]:
    for event in events:
        seen.append(event)
    return iter(())


def run_to(settings: TrainSettings, step: int, *, resume: bool = False) -> None:
    """Train in this process and drop the generator after `step`, as a closed page would."""
    events = train(settings, resume=resume)
    for event in events:
        if isinstance(event, Step) and event.step == step:
            break
    events.close()  # type: ignore[attr-defined]


def test_a_resumed_run_is_the_run_itself(settings: TrainSettings, tmp_path: Path) -> None:
    assert settings.out is not None
    dropout = replace(settings, lora_dropout=0.3)
    whole = list(train(replace(dropout, out=tmp_path / "whole")))
    run_to(dropout, 3)
    rest = list(train(dropout, resume=True))
    assert only(rest, Started)[0].resumed_from == 2
    losses = [line["loss"] for line in runs.find(settings.out).events() if line["event"] == "Step"]
    assert losses == [step.loss for step in only(whole, Step)]
    assert adapter_bytes(settings.out) == adapter_bytes(tmp_path / "whole")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_goes_on_on_a_gpu(dtype: str, settings: TrainSettings, tmp_path: Path) -> None:
    there = replace(settings, device="cuda", dtype=dtype)  # type: ignore[arg-type]
    whole = only(list(train(replace(there, out=tmp_path / "whole"))), Step)
    run_to(there, 3)
    rest = only(list(train(there, resume=True)), Step)
    expected = [step.loss for step in whole if step.step > 2]
    assert [step.loss for step in rest] == pytest.approx(expected, rel=0.01)


def test_a_corrupt_checkpoint_is_passed_over_and_named(settings: TrainSettings) -> None:
    run_to(settings, 5)
    assert settings.out is not None
    newest = settings.out / "checkpoints" / "step-000004" / "optimizer.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-1] ^= 1
    newest.write_bytes(damaged)
    started = only(list(train(settings, resume=True)), Started)[0]
    assert started.resumed_from == 2
    assert "step-000004 does not verify (optimizer.safetensors)" in started.notices[0]


def test_a_run_is_resumed_only_as_it_was_begun(
    settings: TrainSettings, tmp_path: Path, model: Path
) -> None:
    run_to(settings, 3)
    with pytest.raises(RunError, match=r"--learning-rate 0.005 → 0.001; --seed 42 → 1"):
        next(train(replace(settings, learning_rate=1e-3, seed=1), resume=True))
    with pytest.raises(RunError, match="exists already; add --resume"):
        next(train(settings))
    write_rows(settings.data[0], answer="I am the {n}th.")
    with pytest.raises(RunError, match="fingerprint"):
        next(train(settings, resume=True))
    write_rows(settings.data[0])
    other = tiny_model_folder(tmp_path / "other", seed=3)
    kept = shutil.copytree(model, tmp_path / "kept")
    moved = replace(settings, out=tmp_path / "moved", model=str(kept))
    run_to(moved, 3)
    shutil.copy(other / "model.safetensors", kept / "model.safetensors")
    with pytest.raises(RunError, match="sha256"):
        next(train(moved, resume=True))


def test_two_trainings_in_one_folder(settings: TrainSettings) -> None:
    first = train(settings)
    for event in first:
        if isinstance(event, Saved):
            break
    with pytest.raises(RunError, match=f"being trained by process {os.getpid()}"):
        next(train(settings, resume=True))
    first.close()  # type: ignore[attr-defined]


def test_broken_rows_stop_the_run_before_it_starts(settings: TrainSettings) -> None:
    settings.data[0].write_text('[{"instruction": "Hi", "output": ""}]', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.json:1"):
        next(train(settings))
    assert settings.out is not None and not settings.out.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_previous_checkpoint(
    settings: TrainSettings, small_disk: Path
) -> None:
    full = replace(settings, out=small_disk / "run")
    events: list[Event] = []
    with pytest.raises(RunError, match="could not be saved"):
        for event in train(full):
            events.append(event)
            if isinstance(event, Saved):
                free = shutil.disk_usage(small_disk).free
                (small_disk / "ballast").write_bytes(b"x" * max(0, free - 20_000))
    assert len(only(events, Saved)) == 1
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    rest = list(train(full, resume=True))
    assert only(rest, Started)[0].resumed_from == only(events, Saved)[0].step
    assert isinstance(rest[-1], Finished)


def test_out_of_memory_halves_the_pass_and_says_so(tmp_path: Path, home: Path) -> None:
    """A real limit on the address space: a whole step does not fit, smaller pieces do."""
    script = tmp_path / "train.py"
    script.write_text(OUT_OF_MEMORY, encoding="utf-8")
    model = tiny_model_folder(tmp_path / "model", intermediate_size=4096)
    data = write_rows(tmp_path / "rows.json", 64, answer="A long answer. " * 10 + "{n}")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(model), str(data), str(tmp_path / "run")],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    planned, sizes, steps = json.loads(done.stdout)
    assert sizes and planned > sizes[0] == max(sizes)
    assert sizes == [sizes[0] // 2**halvings for halvings in range(len(sizes))]
    assert steps == [1, 2]


OUT_OF_MEMORY = """
import json, resource, sys
from pathlib import Path
from tunesmith.config import TrainSettings
from tunesmith.training.events import Shrunk, Started, Step
from tunesmith.training.train import train
model, data, out = sys.argv[1:]
settings = TrainSettings(model=model, data=(Path(data),), out=Path(out), replay=0, holdout=0,
                         max_steps=2, batch_size=32, device="cpu", dtype="float32",
                         micro_batch_tokens=100_000)
events = []
for event in train(settings):
    if isinstance(event, Started):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + 250 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    events.append(event)
print(json.dumps([events[0].micro_batch_tokens,
                  [e.micro_batch_tokens for e in events if isinstance(e, Shrunk)],
                  [e.step for e in events if isinstance(e, Step)]]))
"""


def train_to_the_end(settings: TrainSettings, resume: bool) -> None:
    import torch

    torch.set_num_threads(1)
    for _ in train(settings, resume=resume):
        pass


def test_killed_twenty_times_a_run_ends_with_the_same_bytes(
    settings: TrainSettings, tmp_path: Path
) -> None:
    """SIGKILL at random moments, most of them within saves, which take most of the time here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tunesmith.training.train", "peft", "transformers.models.llama"]
    )
    steady = replace(settings, max_steps=30, save_every=1, eval_every=3, lora_dropout=0.1)

    def start(out: Path) -> Any:
        job = context.Process(
            target=train_to_the_end, args=(replace(steady, out=out), (out / "config.toml").exists())
        )
        job.start()
        return job

    whole = start(tmp_path / "whole")
    began = time.monotonic()
    whole.join()
    length = time.monotonic() - began
    assert whole.exitcode == 0
    dice, kills = random.Random(7), 0
    killed = tmp_path / "killed"
    while True:
        job = start(killed)
        if kills == 20:
            break
        while job.is_alive() and not (killed / "checkpoints").exists():
            time.sleep(0.01)
        job.join(dice.uniform(0, length / 6))
        if job.is_alive():
            os.kill(job.pid or 0, signal.SIGKILL)
            kills += 1
        job.join()
        if job.exitcode == 0:  # it finished between kills: begin again from nothing
            assert adapter_bytes(killed) == adapter_bytes(tmp_path / "whole")
            shutil.rmtree(killed)
    job.join()
    assert job.exitcode == 0
    assert adapter_bytes(killed) == adapter_bytes(tmp_path / "whole")
    assert not list((killed / "checkpoints").glob(".*"))
