"""What a hub must offer so that a model can be fetched from it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from tunesmith.errors import DownloadError
from tunesmith.models.reference import Reference, Source


@dataclass(frozen=True)
class RemoteFile:
    """A file as a hub lists it. A hub gives its SHA-256 or, for small files, git's blob SHA-1."""

    path: str
    size: int
    revision: str
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def key(self) -> str:
        """A name for the partial file: two files never share one, nor two versions of a file."""
        version = self.sha256 or self.git_sha1 or self.revision
        return f"{version[:16]}-{self.path.replace('/', '+')}"


@dataclass(frozen=True)
class Listing:
    """One commit of a repository."""

    revision: str
    licence: str
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True)
class Body:
    """Bytes of a file from `offset` on; a server may ignore where it was asked to start."""

    offset: int
    chunks: Iterator[bytes]


class Hub(Protocol):
    """One place models come from, spoken to through its own client library."""

    @property
    def source(self) -> Source:
        """Which hub this is."""
        ...

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What the client raises when a request fails."""
        ...

    @property
    def endpoint(self) -> str:
        """The URL requests go to."""
        ...

    def listing(self, reference: Reference) -> Listing:
        """What the repository holds at the revision, resolved to a commit."""
        ...

    def stream(
        self, reference: Reference, file: RemoteFile, start: int
    ) -> AbstractContextManager[Body]:
        """Open a file at byte `start`."""
        ...

    def refusal(self, reference: Reference, error: Exception) -> DownloadError | None:
        """The error to show if trying again cannot help: missing, gated, wrong token."""
        ...


def licence_name(value: object) -> str:
    """A licence as hubs state it: a name, several, or nothing."""
    names = value if isinstance(value, list) else [value]
    return ", ".join(str(name) for name in names if name) or "unknown"


def range_start(content_range: str | None) -> int:
    """First byte of a `bytes 5-9/10` header; 0, as for a whole body, without one."""
    first = (content_range or "").removeprefix("bytes").strip().partition("-")[0]
    return int(first) if first.isdigit() else 0
