"""The bytes of a model: resumed where they stopped, proven, and put in place whole.

A download's folder holds `partial/`, files that still grow, and `files/`, files that verified.
"""

import hashlib
from collections.abc import Generator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from tunesmith.errors import DownloadError
from tunesmith.language import t
from tunesmith.models.manifest import FileEntry
from tunesmith.models.reference import SOURCE_NAMES, Reference
from tunesmith.models.remote import Hub, RemoteFile

_WORKERS = 4
_TRIES = 4  # in a row without a new byte
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Progress:
    """Bytes of the whole model that are here; `file` grew last."""

    file: str
    done: int
    total: int


@dataclass
class Fetch:
    """One model on its way from a hub into `folder`."""

    hub: Hub
    reference: Reference
    folder: Path
    cancelled: Event = field(default_factory=Event)
    here: dict[str, int] = field(default_factory=dict)
    latest: str = ""

    def partial(self, file: RemoteFile) -> Path:
        """Where a file grows."""
        return self.folder / "partial" / file.key

    def whole(self, file: RemoteFile) -> Path:
        """Where a file lies once it verified."""
        return self.folder / "files" / file.path

    def bytes_here(self, file: RemoteFile) -> int:
        """Bytes of a file that need not be fetched again."""
        whole, partial = self.whole(file), self.partial(file)
        path = whole if whole.exists() else partial
        return min(path.stat().st_size, file.size) if path.exists() else 0

    def run(
        self, files: tuple[RemoteFile, ...]
    ) -> Generator[Progress, None, tuple[FileEntry, ...]]:
        """Fetch and verify every file, several at a time.

        Raises:
            DownloadError: The hub refused, gave up, or sent what does not verify.
            OSError: The disk refused; what arrived stays for the next run.
        """
        total = sum(file.size for file in files)
        self.here.update({file.path: self.bytes_here(file) for file in files})
        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="pull") as pool:
            jobs = [pool.submit(copy_context().run, self._fetch, file) for file in files]
            try:
                pending = set(jobs)
                while pending:
                    done, pending = wait(pending, _POLL_SECONDS, return_when=FIRST_EXCEPTION)
                    for job in done:
                        job.result()
                    yield Progress(self.latest, sum(self.here.values()), total)
            finally:
                self.cancelled.set()
                for job in jobs:
                    job.cancel()
        return tuple(job.result() for job in jobs)

    def _fetch(self, file: RemoteFile) -> FileEntry:
        whole, partial = self.whole(file), self.partial(file)
        whole.parent.mkdir(parents=True, exist_ok=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        if whole.is_file() and (sha256 := verified(whole, file)):
            self._grew(file, file.size)
            return FileEntry(file.path, file.size, sha256)
        for _ in range(2):
            self._complete(file, partial)
            if sha256 := verified(partial, file):
                partial.replace(whole)
                return FileEntry(file.path, file.size, sha256)
            partial.unlink()
        raise DownloadError(
            t(
                "{file} of {repo} arrived twice with a wrong checksum and was thrown away; "
                "try again later, or another source.",
                file=file.path,
                repo=self.reference,
            )
        )

    def _complete(self, file: RemoteFile, partial: Path) -> None:
        partial.touch()
        failures, size = 0, partial.stat().st_size
        while size != file.size:
            start = size if size < file.size else 0
            cause = self._append(file, partial, start)
            if self.cancelled.is_set():
                raise DownloadError(t("The download was stopped."))
            size = partial.stat().st_size
            failures = 0 if start < size <= file.size else failures + 1
            if failures >= _TRIES:
                raise self._gave_up(file, cause) from cause
            if failures:
                self.cancelled.wait(0.25 * 2**failures)

    def _append(self, file: RemoteFile, partial: Path, start: int) -> Exception | None:
        try:
            with self.hub.stream(self.reference, file, start) as body:
                if body.offset not in (0, start):
                    return None
                with partial.open("r+b") as out:
                    out.seek(body.offset)
                    out.truncate()
                    for chunk in body.chunks:
                        out.write(chunk)
                        self._grew(file, out.tell())
                        if self.cancelled.is_set() or out.tell() > file.size:
                            return None
        except self.hub.errors as error:
            if refusal := self.hub.refusal(self.reference, error):
                raise refusal from error
            return error
        return None

    def _grew(self, file: RemoteFile, size: int) -> None:
        self.here[file.path] = min(size, file.size)
        self.latest = file.path

    def _gave_up(self, file: RemoteFile, cause: Exception | None) -> DownloadError:
        return DownloadError(
            t(
                "{file} of {repo} did not arrive whole from {hub} ({reason}); what is here stays: "
                "run the same command again.",
                file=file.path,
                repo=self.reference.repo,
                hub=SOURCE_NAMES[self.hub.source],
                reason=reason(cause),
            )
        )


def verified(path: Path, file: RemoteFile) -> str | None:
    """The SHA-256 of a file that is what the hub listed, else None."""
    if path.stat().st_size != file.size:
        return None
    sha256 = hashlib.sha256()
    blob = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with path.open("rb") as content:
        while chunk := content.read(1024 * 1024):
            sha256.update(chunk)
            if file.git_sha1:
                blob.update(chunk)
    if file.sha256 and sha256.hexdigest() != file.sha256:
        return None
    if file.git_sha1 and blob.hexdigest() != file.git_sha1:
        return None
    return sha256.hexdigest()


def reason(error: Exception | None) -> str:
    """What went wrong, in a word: never the client's text, which may hold signed addresses."""
    if error is None:
        return t("wrong length")
    response = getattr(error, "response", None)
    status = getattr(error, "status_code", None) or getattr(response, "status_code", None)
    return f"HTTP {status}" if status else type(error).__name__
