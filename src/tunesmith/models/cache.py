"""Folders that are expensive to make: made once, whole, however many processes ask at once."""

import fcntl
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tunesmith.errors import ModelError
from tunesmith.language import t
from tunesmith.paths import new_folder


def made_once(
    target: Path, make: Callable[[Path], None], *, is_whole: Callable[[Path], bool] = Path.is_dir
) -> Path:
    """`target`, filled by `make(folder)` unless it is there already, and whole.

    A second process that asks meanwhile waits, then finds it. A failed `make` leaves nothing.

    Raises:
        ModelError: The disk is full or not writable.
    """
    if is_whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_name(f".{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_whole(target):
                _remove_unfinished(target)
                with new_folder(target) as folder:
                    make(folder)
    except OSError as error:
        raise ModelError(
            t("{path} could not be written: {reason}", path=target, reason=error.strerror or error)
        ) from error
    return target


def keep_newest(folder: Path, count: int) -> None:
    """Of what `made_once` made in this folder keep so many, those last changed or touched.

    What a killed process left unfinished goes too.
    """
    made = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for path in sorted(made, key=lambda path: path.stat().st_mtime, reverse=True)[count:]:
        shutil.rmtree(path, ignore_errors=True)
    for file in folder.glob(".*.lock"):
        target = file.with_name(file.name[1:].removesuffix(".lock"))
        with file.open("w") as lock, suppress(BlockingIOError):  # it is being made just now
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_unfinished(target)


def _remove_unfinished(target: Path) -> None:
    """Whoever holds the target's lock knows that nobody else is filling these."""
    for left in target.parent.glob(f".{target.name}.*.part"):
        shutil.rmtree(left)
