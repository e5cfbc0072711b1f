"""Models that are on this machine: where they lie, and what a MODEL argument means."""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tunesmith import paths
from tunesmith.errors import ModelError, UsageError
from tunesmith.language import t
from tunesmith.models import catalog, manifest
from tunesmith.models.catalog import Package
from tunesmith.models.lock import lock_model
from tunesmith.models.manifest import FileEntry
from tunesmith.models.reference import Reference, Source, is_reference, parse, shown

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r"-(\d{5})-of-\d{5}\.gguf")


@dataclass(frozen=True)
class LocalModel:
    """A model whose files are here.

    `path` is a folder in the Hugging Face layout, or a `.gguf` file. `sha256` is the hash of its
    weights as the manifest lists them, so two places that hold the same model agree. `revision`
    is the commit it was pulled at, empty for a local folder or file.
    """

    name: str
    path: Path
    source: Source
    revision: str
    sha256: str

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are one GGUF file."""
        return self.path.suffix == ".gguf"


@dataclass(frozen=True)
class Installed:
    """A downloaded model, as `tunesmith models` lists it. `size` is in bytes."""

    name: str
    path: Path
    source: Source
    repo: str
    revision: str
    size: int
    licence: str


@dataclass(frozen=True)
class Target:
    """A model that can be pulled: its name, its folder here, and where it may come from."""

    name: str
    path: Path
    sources: tuple[Reference, ...]
    licence: str | None = None
    package: Package | None = None

    @property
    def partial(self) -> Path:
        """Where a download is kept until it is whole."""
        return self.path.with_name(f".{self.path.name}.part")


def resolve(spec: str) -> Target | Path:
    """What a MODEL argument means: something to pull, or a local folder or `.gguf` file.

    Raises:
        UsageError: It means nothing.
    """
    if entry := catalog.find(spec):
        folder = paths.models_dir() / entry.name
        return Target(entry.name, folder, entry.sources, entry.licence, entry.package)
    if is_reference(spec):
        reference = parse(spec)
        return Target(str(reference), paths.models_dir() / reference.folder, (reference,))
    path = Path(spec).expanduser()
    if spec and _exists(path):
        return path
    near = catalog.closest(spec)
    hint = t(" Did you mean {names}?", names=", ".join(near)) if near else ""
    raise UsageError(
        t(
            "{spec} is not in the catalog, and no folder or .gguf file has that name.{hint}",
            spec=shown(spec),
            hint=hint,
        )
    )


def locate(spec: str) -> LocalModel:
    """The model `spec` means, its files checked against the manifest. Never goes online.

    Raises:
        UsageError: `spec` means nothing.
        ModelError: The model is not here, or its files are not what they should be.
    """
    target = resolve(spec)
    if isinstance(target, Path):
        return _local(target)
    if not (target.path / manifest.MANIFEST).exists():
        raise ModelError(
            t("{name} is not on this machine; run: tunesmith pull {name}", name=target.name)
        )
    return open_installed(target.path)


def open_installed(folder: Path) -> LocalModel:
    """A downloaded model, verified.

    Raises:
        ModelError: The manifest is broken, or a file is missing or has changed.
    """
    content = manifest.read(folder)
    manifest.verify(folder, content)
    path = model_path(folder)
    return LocalModel(content.name, path, content.source, content.revision, content.sha256)


def installed() -> list[Installed]:
    """Every downloaded model, by name.

    Raises:
        ModelError: A manifest is broken.
    """
    found = []
    for file in sorted(paths.models_dir().glob(f"*/{manifest.MANIFEST}")):
        one = manifest.read(file.parent)
        found.append(
            Installed(
                one.name, file.parent, one.source, one.repo, one.revision, one.size, one.licence
            )
        )
    return sorted(found, key=lambda item: item.name)


def remove(name: str) -> int:
    """Delete a downloaded model, and what a cut download left; returns the bytes freed.

    Raises:
        UsageError: `name` is no model's name; a path is never deleted.
        ModelError: No such model is here, or it is being pulled.
    """
    target = resolve(name)
    if isinstance(target, Path):
        raise UsageError(
            t(
                "{path} was not downloaded by tunesmith, so it is not removed; "
                "run: tunesmith models",
                path=shown(name),
            )
        )
    folders = [path for path in (target.path, target.partial) if path.is_dir()]
    if not folders:
        raise ModelError(t("{name} is not on this machine.", name=target.name))
    lock = lock_model(target.path)
    if lock is None:
        raise ModelError(t("{name} is being pulled by another process.", name=target.name))
    with lock:
        files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        for folder in folders:
            shutil.rmtree(folder)
    return size


def model_path(folder: Path) -> Path:
    """What to load from a folder: the folder itself, or the one `.gguf` file in it.

    Raises:
        ModelError: There is no model in it, or more than one, or only pickled weights.
    """
    names = sorted(item.name for item in folder.iterdir() if item.is_file())
    if any(name.endswith(".safetensors") for name in names):
        if "config.json" not in names:
            raise ModelError(t("{path} holds weights but no config.json.", path=folder))
        return folder
    first = [name for name in names if name.endswith(".gguf") and not _later_shard(name)]
    if len(first) == 1:
        return folder / first[0]
    if first:
        raise ModelError(
            t(
                "{path} holds several models; name one of: {files}",
                path=folder,
                files=", ".join(first),
            )
        )
    if any(name.endswith(_PICKLES) for name in names):
        raise ModelError(
            t(
                "{path} holds only pickled weights, which can run code when loaded; "
                "get the same model as safetensors or GGUF.",
                path=folder,
            )
        )
    raise ModelError(
        t(
            "{path} holds no model: expected config.json with .safetensors files, "
            "or one .gguf file.",
            path=folder,
        )
    )


def _later_shard(name: str) -> bool:
    shard = _SHARD.search(name)
    return shard is not None and shard[1] != "00001"


def _local(given: Path) -> LocalModel:
    path = given.resolve()
    if path.is_file() and path.suffix != ".gguf":
        raise ModelError(t("{path} is not a .gguf file.", path=given))
    path = path if path.is_file() else model_path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    entries = (FileEntry(file.name, file.stat().st_size, _cached_sha256(file)) for file in files)
    name = path.stem if path.is_file() else path.name
    return LocalModel(name, path, "local", "", manifest.weights_sha256(entries))


def _cached_sha256(path: Path) -> str:
    """Hash a file once; until its size or time changes, the note in the cache answers."""
    stat = path.stat()
    key = [str(path), stat.st_size, stat.st_mtime_ns]
    note = paths.cache_dir() / "sha256" / hashlib.sha256(str(path).encode()).hexdigest()
    try:
        *known, sha256 = json.loads(note.read_text())
        if known == key:
            return str(sha256)
    except (OSError, ValueError):
        pass  # never hashed, or the note is unreadable: hash it now
    sha256 = manifest.file_sha256(path)
    paths.write_atomic(note, json.dumps([*key, sha256]))
    return sha256


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
