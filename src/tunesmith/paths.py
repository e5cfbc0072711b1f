"""Where things lie on disk.

`TUNESMITH_HOME` (else the platform's data folder) holds models and caches; runs lie in the
working directory, under `runs/`, because they belong to the user's project.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

import platformdirs


def home() -> Path:
    """The folder that holds downloaded models and caches."""
    chosen = os.environ.get("TUNESMITH_HOME")
    return Path(chosen).expanduser() if chosen else platformdirs.user_data_path("tunesmith")


def models_dir() -> Path:
    """Downloaded models, one folder each."""
    return home() / "models"


def cache_dir() -> Path:
    """What can be made again: weights, tokenizers, samples, the base's neutral answers."""
    return home() / "cache"


def runs_dir() -> Path:
    """Run folders, in the working directory."""
    return Path("runs")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that after a crash it holds the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it appears at `path` in one rename once the block ends without error.

    A folder already at `path` is replaced. Nothing is left behind when the block fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield part
        replace_folder(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def replace_folder(part: Path, path: Path) -> None:
    """Flush the files of `part` and put it at `path` in one rename; what lay there goes last."""
    for file in part.rglob("*"):
        if file.is_file():
            _sync(file)
    if path.exists():
        old = Path(mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        path.rename(old / path.name)
        part.rename(path)
        shutil.rmtree(old)
    else:
        part.rename(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames within `path` survive a power cut."""
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
