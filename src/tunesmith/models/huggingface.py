"""Hugging Face through its own client: endpoint, token, proxy and redirects are the client's."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

from tunesmith import __version__
from tunesmith.errors import DownloadError
from tunesmith.language import t
from tunesmith.models.reference import Reference, Source
from tunesmith.models.remote import Body, Listing, RemoteFile, licence_name, range_start


class HuggingFace:
    """`HF_ENDPOINT` chooses a mirror, `HF_TOKEN` or `hf auth login` the account."""

    source: Source = "hf"

    @property
    def endpoint(self) -> str:
        """The URL requests go to."""
        from huggingface_hub import constants

        return os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")

    @cached_property
    def errors(self) -> tuple[type[Exception], ...]:
        """What the client raises; its root is the HTTP library's, which newer versions swapped."""
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        root = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
        return (root, OfflineModeIsEnabled)

    def listing(self, reference: Reference) -> Listing:
        """What the repository holds at the revision, resolved to a commit."""
        from huggingface_hub import HfApi, constants

        api = HfApi(endpoint=self.endpoint)
        info = api.model_info(
            reference.repo,
            revision=reference.revision,
            files_metadata=True,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        )
        if info.gated:  # listing is open to all; say now what the first file would say
            api.auth_check(reference.repo)
        commit = info.sha or reference.revision or "main"
        files = tuple(
            RemoteFile(
                path=item.rfilename,
                size=item.size or 0,
                revision=commit,
                sha256=item.lfs.sha256 if item.lfs else None,
                git_sha1=None if item.lfs else item.blob_id,
            )
            for item in info.siblings or ()
        )
        return Listing(commit, licence_name(getattr(info.card_data, "license", None)), files)

    @contextmanager
    def stream(self, reference: Reference, file: RemoteFile, start: int) -> Iterator[Body]:
        """Open a file at byte `start`."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, loaded lazily
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        url = hf_hub_url(reference.repo, file.path, revision=file.revision, endpoint=self.endpoint)
        headers = build_hf_headers(library_name="tunesmith", library_version=__version__)
        headers["Accept-Encoding"] = "identity"
        if start:
            headers["Range"] = f"bytes={start}-"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            yield Body(range_start(response.headers.get("Content-Range")), response.iter_bytes())

    def refusal(self, reference: Reference, error: Exception) -> DownloadError | None:
        """The error to show if trying again cannot help: missing, gated, wrong token."""
        from huggingface_hub import errors

        repo, page = reference.repo, f"{self.endpoint}/{reference.repo}"
        if isinstance(error, errors.OfflineModeIsEnabled):
            return DownloadError(
                t("HF_HUB_OFFLINE is set, so {repo} cannot be fetched; unset it.", repo=repo)
            )
        if isinstance(error, errors.GatedRepoError):
            return DownloadError(
                t(
                    "{repo} on Hugging Face is gated: accept its licence at {page}, "
                    "then run: hf auth login",
                    repo=repo,
                    page=page,
                )
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return DownloadError(
                t(
                    "{repo} on {hub} has no revision {revision}; see {page}",
                    repo=repo,
                    hub="Hugging Face",
                    revision=reference.revision,
                    page=page,
                )
            )
        if isinstance(error, errors.RepositoryNotFoundError | errors.RemoteEntryNotFoundError):
            return DownloadError(
                t(
                    "{repo} is not on Hugging Face, or is private; check the name, "
                    "or run: hf auth login",
                    repo=repo,
                )
            )
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status in (401, 403):
            return DownloadError(
                t(
                    "Hugging Face refused access to {repo}; check your token with: hf auth whoami",
                    repo=repo,
                )
            )
        return None
