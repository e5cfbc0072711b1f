"""Run folders. This module alone knows their layout and writes into them.

runs/NAME/
  config.toml         the settings, loadable as a recipe
  data.json           fingerprints and counts of what was trained on
  replay.safetensors  the base model's own answers that were mixed in
  probes.safetensors  others, at which it is seen how far tuning has moved the model
  held_out.jsonl      rows kept from training
  metrics.jsonl       one event a line
  notes.md            what the user wrote about it
  compare.json        what base and tuned answered, and what that amounts to
  tasks.json          what base and tuned scored in standard tasks
  report.html         all of it on one page
  initial/            the adapter before the first step (PiSSA and OLoRA only)
  adapter/            what PEFT loads, and tunesmith.json
  checkpoints/        step-000040/ …, each with a manifest.json written last
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import tomli_w

from tunesmith import paths
from tunesmith.config import TrainSettings, flag, read_recipe, settings_to
from tunesmith.errors import RunError, UsageError
from tunesmith.language import t

# These say where and in what pieces the work is done, not what is computed.
FREE_TO_CHANGE = frozenset(
    {"out", "device", "micro_batch_tokens", "gradient_checkpointing", "memory_gb"}
)


@dataclass(frozen=True)
class Run:
    """A folder that `train` made, or is making."""

    path: Path

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def adapter(self) -> Path:
        """The finished adapter's folder; it exists once training has finished."""
        return self.path / "adapter"

    @property
    def initial(self) -> Path:
        """The adapter before the first step, kept where the initialisation changes the base."""
        return self.path / "initial"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """Events, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def replay(self) -> Path:
        """The base model's own answers that are mixed in."""
        return self.path / "replay.safetensors"

    @property
    def probes(self) -> Path:
        """The base model's own answers at which it is seen how far tuning has moved it."""
        return self.path / "probes.safetensors"

    @property
    def held_out(self) -> Path:
        """Rows kept from training, as messages JSONL."""
        return self.path / "held_out.jsonl"

    @property
    def notes(self) -> str:
        """What the user wrote about it; empty at first.

        Raises:
            RunError: The file cannot be read.
        """
        file = self.path / "notes.md"
        try:
            return file.read_text("utf-8")
        except FileNotFoundError:
            return ""
        except (OSError, ValueError) as error:
            raise RunError(t("{file} cannot be read ({error}).", file=file, error=error)) from None

    def write_notes(self, text: str) -> None:
        """Keep what the user wrote about it.

        Raises:
            RunError: The run is gone, or the disk is full or not writable.
        """
        self._keep(self.path / "notes.md", text)

    @property
    def comparison(self) -> dict[str, Any] | None:
        """`compare.json`, or None where base and tuned have not been asked.

        Raises:
            RunError: The file is broken.
        """
        file = self.path / "compare.json"
        return read_json(file) if file.exists() else None

    def write_comparison(self, found: Mapping[str, Any]) -> None:
        """Keep what base and tuned answered; raises as `write_notes`."""
        self._keep(self.path / "compare.json", json.dumps(found, ensure_ascii=False, indent=1))

    @property
    def tasks(self) -> dict[str, Any]:
        """`tasks.json`; empty where no standard task has been asked.

        Raises:
            RunError: The file is broken.
        """
        file = self.path / "tasks.json"
        return read_json(file) if file.exists() else {}

    def write_tasks(self, found: Mapping[str, Any]) -> None:
        """Keep what base and tuned scored; raises as `write_notes`."""
        self._keep(self.path / "tasks.json", json.dumps(found, ensure_ascii=False, indent=1))

    @property
    def report(self) -> Path:
        """The page that tells of it."""
        return self.path / "report.html"

    def _keep(self, file: Path, text: str) -> None:
        if not self.path.is_dir():
            raise RunError(t("{path} is gone.", path=self.path))
        write(file, text)

    @property
    def begun(self) -> datetime:
        """When it was begun, in this machine's time.

        Raises:
            RunError: It is gone.
        """
        try:
            return datetime.fromtimestamp((self.path / "config.toml").stat().st_mtime)
        except OSError:
            raise RunError(t("{path} is gone.", path=self.path)) from None

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        files = (Path(at) / name for at, _, names in os.walk(self.path) for name in names)
        return sum(map(_size, files))

    @property
    def settings(self) -> TrainSettings:
        """The settings the run was made with.

        Raises:
            RunError: `config.toml` is missing or broken.
        """
        try:
            return TrainSettings(**read_recipe(self.path / "config.toml"))
        except UsageError as error:
            raise RunError(
                t("{error} Train into a new folder instead of {path}.",
                  error=error, path=self.path)
            ) from None  # fmt: skip

    @property
    def data(self) -> dict[str, Any]:
        """`data.json`: fingerprints and counts.

        Raises:
            RunError: The file is missing or broken.
        """
        return read_json(self.path / "data.json")

    def write_data(self, data: Mapping[str, Any]) -> None:
        """Write `data.json`."""
        write(self.path / "data.json", json.dumps(data, ensure_ascii=False, indent=2) + "\n")

    def record(self, event: object) -> None:
        """Append an event to `metrics.jsonl`.

        Raises:
            RunError: The disk is full or not writable.
        """
        line = {"event": type(event).__name__} | asdict(event)  # type: ignore[call-overload]
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        except OSError as error:
            raise RunError(
                t("{file} cannot be written ({error}); checkpoints are whole. Free some space, "
                  "then train again with --resume.", file=self.metrics, error=error.strerror)
            ) from None  # fmt: skip

    def events(self) -> list[dict[str, Any]]:
        """What `metrics.jsonl` holds; a last line cut off by a crash is left out.

        Raises:
            RunError: It cannot be read, or another line is no event.
        """
        try:
            text = self.metrics.read_text("utf-8")
            events = [json.loads(line) for line in text.split("\n")[:-1] if line]
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise RunError(
                t("{file} cannot be read ({error}).", file=self.metrics, error=error)
            ) from None
        if not all(isinstance(event, dict) and "event" in event for event in events):
            raise RunError(t("{file} does not hold events.", file=self.metrics))
        return events

    def rewind(self, step: int) -> None:
        """Forget events after `step`, which a resumed run will meet again."""
        kept = [line for line in self.events() if line.get("step", 0) <= step]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        paths.write_atomic(self.metrics, text)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process. The system frees it when the process ends, however.

        Raises:
            RunError: Another process is training in this folder.
        """
        with (self.path / ".lock").open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise RunError(
                    t("{path} is being trained by process {pid}; wait for it, or use another "
                      "--out.", path=self.path, pid=file.read().strip() or "?")
                ) from None  # fmt: skip
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    @property
    def trainer(self) -> int | None:
        """The process that is training it now, or None.

        The lock itself is not tried: for that moment nobody could begin.
        """
        import psutil

        lock = self.path / ".lock"
        try:
            process = psutil.Process(int(lock.read_text("utf-8")))
            held = any(Path(file.path) == lock.resolve() for file in process.open_files())
        except (OSError, ValueError, psutil.Error):
            return None
        return process.pid if held else None


def create(settings: TrainSettings) -> Run:
    """Make the folder of a new run and write its settings.

    Raises:
        RunError: The folder exists and is not empty.
    """
    path = settings.out or _new_path()
    if path.exists() and any(path.iterdir()):
        raise RunError(
            t("{path} exists already; add --resume to go on with it, or choose another --out.",
              path=path)
        )  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    paths.write_atomic(path / "config.toml", tomli_w.dumps(settings_to(settings)))
    return Run(path)


def find(name: str | Path) -> Run:
    """The run of this name under `runs/`, or at this path.

    Raises:
        RunError: There is none; the message lists those there are.
    """
    for path in (Path(name), paths.runs_dir() / name):
        if (path / "config.toml").is_file():
            return Run(path)
    here = ", ".join(run.name for run in every()) or t("none yet")
    raise RunError(t("No run at {name}; runs here: {here}.", name=name, here=here))


def is_run(name: str | Path) -> bool:
    """Whether `find(name)` would find a run."""
    return any((path / "config.toml").is_file() for path in (Path(name), paths.runs_dir() / name))


def every() -> list[Run]:
    """All runs under `runs/`, by name."""
    return [Run(file.parent) for file in sorted(paths.runs_dir().glob("*/config.toml"))]


def remove(run: Run) -> int:
    """Delete a run with all that is in it; returns the bytes freed.

    Raises:
        RunError: It is gone, it is being trained, or the system refuses.
    """
    if not run.path.is_dir():
        raise RunError(t("{path} is gone.", path=run.path))
    if (pid := run.trainer) is not None:
        raise RunError(t("{path} is being trained by process {pid}; stop that first.",
                         path=run.path, pid=pid))  # fmt: skip
    size = run.size
    try:
        with run.lock():
            # Out of sight in one rename, so that no half of a run is ever taken for one.
            grave = Path(mkdtemp(prefix=f".{run.name}.", suffix=".old", dir=run.path.parent))
            run.path.rename(grave / run.name)
            shutil.rmtree(grave)
    except OSError as error:
        raise RunError(
            t("{path} cannot be deleted ({reason}).", path=run.path, reason=error.strerror)
        ) from None
    return size


def require_same(run: Run, settings: TrainSettings) -> None:
    """Refuse to resume a run with other settings than it began with.

    Raises:
        RunError: The difference, setting by setting.
    """
    before, now = settings_to(run.settings), settings_to(settings)
    changed = [
        f"{flag(name)} {before.get(name)} → {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if name not in FREE_TO_CHANGE and before.get(name) != now.get(name)
    ]
    if changed:
        raise RunError(
            t("{path} was begun with other settings ({changed}); resume it with its own, or "
              "train into a new folder.", path=run.path, changed="; ".join(changed))
        )  # fmt: skip


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of a run.

    Raises:
        RunError: The file is missing or broken.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(t("{file} cannot be read ({error}).", file=file, error=error)) from None
    if not isinstance(content, dict):
        raise RunError(t("{file} does not hold a JSON object.", file=file))
    return content


def write(file: Path, text: str) -> None:
    """Write a file about a run; half a character in it becomes a question mark.

    Raises:
        RunError: The disk is full or not writable.
    """
    try:
        paths.write_atomic(file, text.encode("utf-8", "replace"))
    except OSError as error:
        message = t("{path} cannot be written ({reason}).", path=file, reason=error.strerror)
        raise RunError(message) from None


def _size(file: Path) -> int:
    try:
        return file.lstat().st_size
    except FileNotFoundError:
        return 0  # training replaces its checkpoints


def _new_path() -> Path:
    number = 1
    while (path := paths.runs_dir() / f"run-{number:03d}").exists():
        number += 1
    return path
