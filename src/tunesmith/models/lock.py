"""The right to change one model's files; a dead process's lock is gone with it."""

import fcntl
from pathlib import Path
from typing import IO

from tunesmith import paths


def lock_model(folder: Path) -> IO[str] | None:
    """The lock of a model's folder, held until closed; None while another process holds it."""
    path = paths.models_dir() / ".locks" / folder.name
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock
