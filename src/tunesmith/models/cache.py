"""Folders that are expensive to make: made once, whole, however many processes ask at once."""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

from tunesmith.errors import ModelError
from tunesmith.language import t
from tunesmith.paths import new_folder


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, filled by `make(folder)` unless it is there already.

    A second process that asks meanwhile waits, then finds it. A failed `make` leaves nothing.

    Raises:
        ModelError: The disk is full or not writable.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_name(f".{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                for left in target.parent.glob(f".{target.name}.*.part"):
                    shutil.rmtree(left)  # of a process that was killed, since the lock is ours
                with new_folder(target) as folder:
                    make(folder)
    except OSError as error:
        raise ModelError(
            t("{path} could not be written: {reason}", path=target, reason=error.strerror or error)
        ) from error
    return target
