"""What a model folder must hold: every file's size and SHA-256, and where it came from.

`manifest.json` is written once, when a download has verified. `stamp.json` beside it records size
and modification time of the files that were hashed, so that a later start only compares those.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith import paths
from tunesmith.errors import ModelError
from tunesmith.language import t
from tunesmith.models.reference import Source

MANIFEST = "manifest.json"
STAMP = "stamp.json"
WEIGHT_SUFFIXES = (".safetensors", ".gguf")


@dataclass(frozen=True)
class FileEntry:
    """One file: path within the folder, size in bytes, SHA-256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A downloaded model. `revision` is the commit it was pulled at."""

    name: str
    source: Source
    repo: str
    revision: str
    licence: str
    files: tuple[FileEntry, ...]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.size for file in self.files)

    @property
    def sha256(self) -> str:
        """The hash that identifies the weights."""
        return weights_sha256(self.files)


def weights_sha256(files: Iterable[FileEntry]) -> str:
    """SHA-256 over the hashes of the weight files, in path order; names do not count."""
    weights = sorted((f for f in files if f.path.endswith(WEIGHT_SUFFIXES)), key=lambda f: f.path)
    return hashlib.sha256("".join(f"{file.sha256}\n" for file in weights).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and the stamp of files that were just hashed."""
    paths.write_atomic(folder / MANIFEST, json.dumps(asdict(manifest), indent=2))
    _write_stamp(folder, manifest)


def read(folder: Path) -> Manifest:
    """The manifest of a model folder.

    Raises:
        ModelError: It cannot be read.
    """
    path = folder / MANIFEST
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        content["files"] = tuple(FileEntry(**file) for file in content["files"])
        return Manifest(**content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            t("{path} is broken; delete its folder and pull the model again.", path=path)
        ) from error


def verify(folder: Path, manifest: Manifest) -> None:
    """Check the files: by stamp if it fits, else by hash, after which it fits.

    Raises:
        ModelError: A file is missing or not what was downloaded.
    """
    if _stamp_fits(folder, manifest):
        return
    for file in manifest.files:
        path = folder / file.path
        if not path.is_file() or file_sha256(path) != file.sha256:
            raise ModelError(
                t(
                    "{path} is missing or has changed since it was downloaded; "
                    "run: tunesmith pull {name}",
                    path=path,
                    name=manifest.name,
                )
            )
    _write_stamp(folder, manifest)


def _stamp_fits(folder: Path, manifest: Manifest) -> bool:
    try:
        return bool(json.loads((folder / STAMP).read_text()) == _stamp(folder, manifest))
    except (OSError, ValueError):
        return False


def _write_stamp(folder: Path, manifest: Manifest) -> None:
    paths.write_atomic(folder / STAMP, json.dumps(_stamp(folder, manifest)))


def _stamp(folder: Path, manifest: Manifest) -> dict[str, list[int]]:
    stats = {file.path: (folder / file.path).stat() for file in manifest.files}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}
