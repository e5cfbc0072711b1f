"""Downloads that the page begins: each a `tunesmith pull` of its own, which outlives the page.

Each has a log in `studio/pulls/` of tunesmith's home: the events as JSON lines, and among them
what else the process had to say.
"""

import fcntl
import json
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith import paths
from tunesmith.apps.studio.child import spawn
from tunesmith.errors import DownloadError, ModelError, UsageError
from tunesmith.language import t
from tunesmith.models.store import Target, remove, resolve

State = Literal["running", "ready", "stopped", "failed"]
ENDS = 20  # lines read at each end of a log; between them lies nothing but progress
ERROR = "tunesmith: "  # begins the one line of an error


@dataclass(frozen=True)
class Pull:
    """A download as its log tells it.

    `pid` is its process while that runs; `done` and `total` are bytes, 0 before the first; `said`
    is the last sentence: a notice while it runs, later why it ended.
    """

    spec: str
    log: Path
    pid: int | None
    state: State
    cancelled: bool
    done: int
    total: int
    said: str | None


def start(spec: str) -> None:
    """Begin to pull a model, or go on with it; one that is being pulled is left alone.

    Raises:
        UsageError: `spec` names nothing that can be pulled.
        DownloadError: The disk is full or not writable.
    """
    log = _log_of(_target(spec))
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the child inherits it
            out.truncate(0)
            pid = spawn(["pull", spec, "--json"], out)
            out.write(_line("Begun", spec=spec, pid=pid))
    except BlockingIOError:
        return
    except OSError as error:
        raise DownloadError(
            t("{path} cannot be written ({reason}).", path=log, reason=error.strerror)
        ) from error


def cancel(pull: Pull) -> None:
    """End a download as Ctrl-C would; what has come stays."""
    if pull.pid is not None:
        with suppress(OSError), pull.log.open("ab") as out:
            out.write(_line("Cancelled"))  # on a full disk the end is only told less well
        with suppress(ProcessLookupError):
            os.kill(pull.pid, signal.SIGINT)


def discard(pull: Pull) -> None:
    """Forget a download that has ended, and delete what came of it.

    Raises:
        ModelError: It is being pulled.
    """
    now = read(pull.log)
    if now is not None and now.pid is not None:
        raise ModelError(t("{name} is being pulled by another process.", name=pull.spec))
    target = _target(pull.spec)
    if target.partial.is_dir() and not target.path.is_dir():
        remove(pull.spec)
    pull.log.unlink(missing_ok=True)


def every() -> list[Pull]:
    """Every download that is under way, or ended without its model; by name."""
    pulls = (read(log) for log in sorted(_folder().glob("*.jsonl")))
    return [pull for pull in pulls if pull is not None and pull.state != "ready"]


def read(log: Path) -> Pull | None:
    """What a log tells; None if it is gone or has not begun."""
    events, sentences = _entries(log)
    kinds = {str(event["event"]): event for event in events}  # of each kind the last
    if "Begun" not in kinds:
        return None
    begun, progress = kinds["Begun"], kinds.get("Progress", {})
    pid = begun["pid"] if _holds(begun["pid"], log) else None
    state = "running" if pid is not None else _end(kinds, sentences)
    told = kinds["Notice"]["text"] if "Notice" in kinds else None
    if pid is None and sentences:
        told = sentences[-1].removeprefix(ERROR)
    return Pull(begun["spec"], log, pid, state, "Cancelled" in kinds,
                progress.get("done", 0), progress.get("total", 0), told)  # fmt: skip


def _end(kinds: dict[str, Any], sentences: list[str]) -> State:
    if "Ready" in kinds and not any(line.startswith(ERROR) for line in sentences):
        return "ready"
    return "failed" if sentences and "Cancelled" not in kinds else "stopped"


def _entries(log: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The events at both ends of a log, and the whole lines that are none."""
    try:
        lines = log.read_text("utf-8", errors="replace").split("\n")[:-1]
    except OSError:
        return [], []
    events, sentences = [], []
    for line in filter(str.strip, lines[:ENDS] + lines[ENDS:][-ENDS:]):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict) and "event" in event:
            events.append(event)
        else:
            sentences.append(line)
    return events, sentences


def _holds(pid: int, log: Path) -> bool:
    """Whether that process lives and writes this log; its number may be another's by now."""
    import psutil

    try:
        files = psutil.Process(pid).open_files()
    except psutil.Error:
        return False
    return any(Path(file.path) == log.resolve() for file in files)


def _target(spec: str) -> Target:
    target = resolve(spec)
    if isinstance(target, Path):
        raise UsageError(
            t("{name} is a file or folder of this machine; name a model of the list, or "
              "hf:owner/name or modelscope:owner/name.", name=spec)
        )  # fmt: skip
    return target


def _folder() -> Path:
    return paths.home() / "studio" / "pulls"


def _log_of(target: Target) -> Path:
    return _folder() / f"{target.path.name}.jsonl"


def _line(kind: str, **values: object) -> bytes:
    return json.dumps({"event": kind, **values}).encode() + b"\n"
