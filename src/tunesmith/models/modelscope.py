"""ModelScope through its own client: endpoint, token, proxy and redirects are the client's."""

import logging
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from typing import Any

from tunesmith.errors import DownloadError
from tunesmith.language import t
from tunesmith.models.reference import Reference, Source
from tunesmith.models.remote import Body, Listing, RemoteFile, licence_name, range_start

_CHUNK = 64 * 1024


class ModelScope:
    """`MODELSCOPE_ENDPOINT` chooses a site, `MODELSCOPE_API_TOKEN` or `ms login` the account."""

    source: Source = "modelscope"

    @property
    def endpoint(self) -> str:
        """The URL requests go to."""
        return os.environ.get("MODELSCOPE_ENDPOINT", "https://modelscope.cn").rstrip("/")

    @cached_property
    def errors(self) -> tuple[type[Exception], ...]:
        """What the client raises."""
        from modelscope_hub.errors import HubError
        from requests import RequestException

        return (HubError, RequestException)

    @cached_property
    def _client(self) -> Any:
        from modelscope_hub import HubApi
        from modelscope_hub.config import HubConfig

        # Its own logger writes retries to the terminal; ours are told as events.
        logging.getLogger("modelscope_hub").setLevel(logging.ERROR)
        return HubApi(HubConfig(endpoint=self.endpoint)).legacy

    def listing(self, reference: Reference) -> Listing:
        """What the repository holds at the revision, each file pinned to its last commit."""
        requested = reference.revision or "master"
        info = self._client.get_repo_info(reference.repo, "model")
        rows = self._client.list_repo_files(reference.repo, "model", requested)
        rows = [row for row in rows if row.get("Type") != "tree"]
        newest: dict[str, Any] = max(
            rows, key=lambda row: int(row.get("CommittedDate") or 0), default={}
        )
        files = tuple(
            RemoteFile(
                path=str(row.get("Path") or row.get("Name")),
                size=int(row.get("Size") or 0),
                revision=row.get("Revision") or requested,
                sha256=row.get("Sha256") or None,
            )
            for row in rows
        )
        return Listing(
            newest.get("Revision") or requested, licence_name(info.get("License")), files
        )

    @contextmanager
    def stream(self, reference: Reference, file: RemoteFile, start: int) -> Iterator[Body]:
        """Open a file at byte `start`."""
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        with closing(self._open(reference, file, headers)) as response:
            offset = range_start(response.headers.get("Content-Range"))
            yield Body(offset, response.iter_content(_CHUNK))

    def _open(self, reference: Reference, file: RemoteFile, headers: dict[str, str]) -> Any:
        from modelscope_hub.errors import NotExistError

        branch = reference.revision or "master"
        try:
            return self._client.download_stream(
                reference.repo, "model", file.path, file.revision, headers
            )
        except NotExistError:
            if file.revision == branch:
                raise
            # A commit the site no longer serves by hash; the checksum decides on the branch's.
            return self._client.download_stream(reference.repo, "model", file.path, branch, headers)

    def refusal(self, reference: Reference, error: Exception) -> DownloadError | None:
        """The error to show if trying again cannot help: missing, gated, wrong token."""
        from modelscope_hub import errors

        repo, page = reference.repo, f"{self.endpoint}/models/{reference.repo}"
        if isinstance(error, errors.NotExistError):
            return DownloadError(
                t(
                    "{repo}, revision {revision}, is not on ModelScope, or is private; "
                    "check the name, or run: ms login",
                    repo=repo,
                    revision=reference.revision or "master",
                )
            )
        if isinstance(error, errors.PermissionDeniedError | errors.AuthenticationError):
            return DownloadError(
                t(
                    "ModelScope refused access to {repo}: accept its terms at {page}, "
                    "then run: ms login",
                    repo=repo,
                    page=page,
                )
            )
        return None
