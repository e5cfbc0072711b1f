"""The files of the data page: what they may be called, and how they are written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tunesmith.errors import UsageError
from tunesmith.language import t

FOLDER = Path("data")
SUFFIXES = ("json", "jsonl", "csv", "parquet")

Stamp = tuple[int, int]
"""When a file was last changed, in nanoseconds, and its size: another stamp, another content."""


def stamp(path: Path) -> Stamp | None:
    """The stamp of a file, None if it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def named(name: str, suffixes: Sequence[str] = SUFFIXES) -> Path:
    """The file of a plain name with one of the endings; whatever leads elsewhere is refused."""
    plain = Path(name.strip()).name
    if plain != name.strip() or plain.startswith(".") or Path(plain).suffix[1:] not in suffixes:
        raise UsageError(
            t("{name} is no name for a data file; it needs to end in {endings}.",
              name=repr(name), endings=", ".join(f".{suffix}" for suffix in suffixes))
        )  # fmt: skip
    return FOLDER / plain


def free(stem: str) -> Path:
    """The first JSONL file of this name, or with a number behind it, that does not exist."""
    path, number = FOLDER / f"{stem}.jsonl", 1
    while path.exists():
        number += 1
        path = FOLDER / f"{stem}-{number}.jsonl"
    return path


def require_free(path: Path) -> None:
    """Refuse to write over a file."""
    if path.exists():
        raise UsageError(t("{path} exists already; choose another name.", path=path))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in a sentence why a file cannot be written, a full disk for one."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            t("{path} cannot be written: {reason}.", path=path, reason=error.strerror)
        ) from error
