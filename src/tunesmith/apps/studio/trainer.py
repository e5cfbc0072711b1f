"""Trainings that the page begins: each a `tunesmith train` of its own, which outlives the page."""

import json
import os
import signal
from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import tomli_w

from tunesmith import paths
from tunesmith.apps.studio.child import listen, spawn
from tunesmith.config import TrainSettings, settings_to
from tunesmith.errors import RunError
from tunesmith.language import t
from tunesmith.runs import Run


def log_of(run: Path) -> Path:
    """Where the training of this run folder writes what it has to say."""
    return run.with_name(f"{run.name}.log")


def plan(settings: TrainSettings) -> Generator[dict[str, Any], None, None]:
    """What the training would take: the events of `tunesmith plan`, as they come.

    Raises:
        RunError: It cannot be begun; the message says why.
    """
    with NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as recipe:
        recipe.write(tomli_w.dumps(settings_to(settings)))
        recipe.flush()
        with closing(listen(["plan", recipe.name, "--json"])) as lines:
            yield from map(json.loads, lines)


def start(settings: TrainSettings) -> Path:
    """Begin a training; returns its run folder, which the training will make.

    Raises:
        RunError: There is a run of this name, or its training is beginning.
    """
    run = settings.out or free_name(settings.model)
    if run.exists() or log_of(run).exists():
        raise RunError(t("{path} exists already; choose another name.", path=run))
    recipe = paths.home() / "studio" / f"{run.name}.toml"
    paths.write_atomic(recipe, tomli_w.dumps(settings_to(settings)))
    _spawn(run, ["train", str(recipe), "--out", str(run)])
    return run


def resume(run: Run) -> None:
    """Go on with a run from its last checkpoint.

    Raises:
        RunError: It is being trained already.
    """
    if (pid := run.trainer) is not None:
        raise RunError(t("{path} is being trained already, by process {pid}.",
                         path=run.path, pid=pid))  # fmt: skip
    _spawn(run.path, ["train", "--resume", str(run.path)])


def stop(run: Run) -> None:
    """End a training as Ctrl-C would; its checkpoints stay."""
    if (pid := run.trainer) is not None:
        os.kill(pid, signal.SIGINT)


def free_name(model: str) -> Path:
    """`runs/` and the model's name, or that with the first number that is free."""
    name = Path(model).stem.replace(":", "-")
    for number in range(1, 10_000):
        path = paths.runs_dir() / (name if number == 1 else f"{name}-{number}")
        if not path.exists() and not log_of(path).exists():
            return path
    raise RunError(t("{path} exists already; choose another name.", path=paths.runs_dir() / name))


def _spawn(run: Path, words: Iterable[str]) -> None:
    log = log_of(run)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        spawn(words, out)
