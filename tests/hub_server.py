"""A local hub that speaks Hugging Face's and ModelScope's HTTP to their real clients.

`HubServer.publish(repo, folder)` commits a folder; both hubs then offer it. `faults` makes it
misbehave. `env()` are the variables that send a process to it.
"""

import hashlib
import json
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

# The client reads these once, at import; with its defaults a failing hub takes half a minute.
os.environ.setdefault("MODELSCOPE_API_MAX_RETRIES", "1")
os.environ.setdefault("MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS", "1")


@dataclass
class Faults:
    """What goes wrong. `cuts` counts down; `flips` is how often each larger file is spoilt."""

    cut_after: int = 0  # bytes of a body, then the connection drops
    cuts: int = 0
    flips: int = 0
    ignore_range: bool = False
    file_status: int = 0
    listing_status: int = 0
    bytes_per_second: int = 0
    extra_names: list[str] = field(default_factory=list)
    omit: list[str] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)
    branches_only: bool = False  # ModelScope's files are not served by commit


@dataclass(frozen=True)
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    host: str
    range: str | None
    authorization: str | None


@dataclass
class Commit:
    """A repository's content at one moment, and for each file the commit that last changed it."""

    sha: str
    number: int
    files: dict[str, bytes]
    changed: dict[str, str]


class HubServer:
    """Serves what was published, on 127.0.0.1; large files come from a second host name."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.requests: list[Seen] = []
        self.flipped: Counter[str] = Counter()
        self.repos: dict[str, list[Commit]] = {}
        self.licences: dict[str, str] = {}
        server = self

        class Handler(_Handler):
            hub = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._http.server_port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def env(self) -> dict[str, str]:
        """Send both clients here, past any proxy."""
        return {
            "HF_ENDPOINT": self.url,
            "MODELSCOPE_ENDPOINT": self.url,
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def publish(self, repo: str, folder: Path, licence: str = "apache-2.0") -> str:
        """Commit a folder's files to the default branch; returns the commit."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        history = self.repos.setdefault(repo, [])
        digest = hashlib.sha1(f"{repo} {len(history)}".encode())
        for name, content in files.items():
            digest.update(name.encode() + content)
        sha = digest.hexdigest()
        last = history[-1] if history else Commit("", 0, {}, {})
        changed = {
            name: last.changed[name] if last.files.get(name) == content else sha
            for name, content in files.items()
        }
        history.append(Commit(sha, len(history) + 1, files, changed))
        self.licences[repo] = licence
        return sha

    def commit(self, repo: str, revision: str) -> Commit | None:
        history = self.repos.get(repo, [])
        if revision in ("main", "master"):
            return history[-1] if history else None
        return next((commit for commit in history if commit.sha == revision), None)

    def file_requests(self) -> list[Seen]:
        """Requests that asked for a file's bytes."""
        return [seen for seen in self.requests if "/resolve/" in seen.path or "/repo?" in seen.path]

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub, with this process sent to it."""
    server = HubServer()
    monkeypatch.delenv("TUNESMITH_HUB", raising=False)
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)
    try:
        yield server
    finally:
        server.close()


def is_large(name: str) -> bool:
    """Kept in large file storage, behind a redirect."""
    return name.endswith((".safetensors", ".gguf", ".bin"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        headers = self.headers
        self.hub.requests.append(
            Seen(
                self.command,
                self.path,
                headers.get("Host", ""),
                headers.get("Range"),
                headers.get("Authorization") or headers.get("Cookie"),
            )
        )
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._hf_info(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/auth-check", path):
            if not self._gate(match[1]):
                self._json(200, {})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if not self._gate(match[1]):
                self._hf_file(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)", path):
            self._ms_info(match[1])
        elif match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", path):
            self._ms_files(match[1], query.get("Revision", "master"))
        elif match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo", path):
            self._ms_file(match[1], query.get("Revision", "master"), query["FilePath"])
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            commit = self.hub.commit(match[1], match[2])
            assert commit is not None
            self._body(commit.files[match[3]])
        else:
            self._json(404, {"error": f"no route {path}"})

    # Hugging Face

    def _hf_info(self, repo: str, revision: str) -> None:
        commit = self.hub.commit(repo, revision)
        if self.hub.faults.listing_status:
            self._json(self.hub.faults.listing_status, {"error": "listing"})
        elif repo not in self.hub.repos:
            self._json(401, {"error": "Invalid username or password."})
        elif commit is None:
            self._json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = [self._hf_sibling(*item) for item in self._listed(commit)]
            info = {
                "id": repo,
                "sha": commit.sha,
                "gated": "manual" if repo in self.hub.faults.gated else False,
                "siblings": siblings,
                "cardData": {"license": self.hub.licences[repo]},
            }
            self._json(200, info)

    def _hf_sibling(self, name: str, content: bytes) -> dict[str, object]:
        row: dict[str, object] = {
            "rfilename": name,
            "size": len(content),
            "blobId": _blob_id(content),
        }
        if is_large(name):
            sha256 = hashlib.sha256(content).hexdigest()
            row["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 134}
        return row

    def _gate(self, repo: str) -> bool:
        if repo not in self.hub.faults.gated:
            return False
        status = 403 if self.headers.get("Authorization") else 401
        message = f"Access to model {repo} is restricted."
        self._json(
            status, {"error": message}, {"X-Error-Code": "GatedRepo", "X-Error-Message": message}
        )
        return True

    def _hf_file(self, repo: str, revision: str, name: str) -> None:
        commit = self.hub.commit(repo, revision)
        if commit is None or name not in commit.files:
            self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        content = commit.files[name]
        if not is_large(name):
            self._body(content, {"X-Repo-Commit": commit.sha, "ETag": f'"{_blob_id(content)}"'})
            return
        etag = hashlib.sha256(content).hexdigest()
        extra = {
            "X-Repo-Commit": commit.sha,
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(len(content)),
        }
        self._redirect(repo, commit, name, extra)

    # ModelScope

    def _ms_info(self, repo: str) -> None:
        if repo not in self.hub.repos:
            self._ms_missing(repo)
        else:
            self._json(200, _answer({"License": self.hub.licences[repo], "Path": repo}))

    def _ms_files(self, repo: str, revision: str) -> None:
        commit = self.hub.commit(repo, revision)
        if self.hub.faults.listing_status:
            self._json(self.hub.faults.listing_status, {"Code": 500, "Message": "listing"})
        elif repo in self.hub.faults.gated:
            self._json(403, {"Code": 403, "Message": "no permission", "Success": False})
        elif commit is None:
            self._ms_missing(repo)
        else:
            rows = [self._ms_row(commit, *item) for item in self._listed(commit)]
            self._json(
                200, _answer({"Files": rows, "LatestCommitter": {"ShortId": commit.sha[:8]}})
            )

    def _ms_row(self, commit: Commit, name: str, content: bytes) -> dict[str, object]:
        changed = commit.changed.get(name, commit.sha)
        number = next(
            (
                item.number
                for repo in self.hub.repos.values()
                for item in repo
                if item.sha == changed
            ),
            0,
        )
        return {
            "Path": name,
            "Name": name.rpartition("/")[2],
            "Type": "blob",
            "Size": len(content),
            "Sha256": hashlib.sha256(content).hexdigest(),
            "Revision": changed,
            "CommittedDate": 1_700_000_000 + number,
            "IsLFS": is_large(name),
        }

    def _ms_file(self, repo: str, revision: str, name: str) -> None:
        commit = self.hub.commit(repo, revision)
        if self.hub.faults.branches_only and revision != "master":
            commit = None
        if commit is None or name not in commit.files:
            self._ms_missing(repo)
        elif is_large(name):
            self._redirect(repo, commit, name, {})
        else:
            self._body(commit.files[name])

    def _ms_missing(self, repo: str) -> None:
        message = f"Repo {repo} not exists or no permission"
        self._json(404, {"Code": 10010205001, "Message": message, "Success": False})

    # Both

    def _listed(self, commit: Commit) -> list[tuple[str, bytes]]:
        faults = self.hub.faults
        kept = [item for item in commit.files.items() if item[0] not in faults.omit]
        return kept + [(name, b"evil") for name in faults.extra_names]

    def _redirect(self, repo: str, commit: Commit, name: str, extra: dict[str, str]) -> None:
        if status := self.hub.faults.file_status:
            self._json(status, {"error": "file"})
            return
        where = quote(f"/cdn/{repo}/{commit.sha}/{name}")
        location = f"http://localhost:{self.hub.port}{where}?Signature=signed-secret"
        self._head(302, extra | {"Location": location, "Content-Length": "0"})

    def _json(self, status: int, content: object, extra: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self._head(status, headers | (extra or {}))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _body(self, content: bytes, extra: dict[str, str] | None = None) -> None:
        faults = self.hub.faults
        if faults.file_status:
            self._json(faults.file_status, {"error": "file"})
            return
        start = 0
        if (wanted := self.headers.get("Range")) and not faults.ignore_range:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        if start >= len(content) > 0:
            self._json(416, {}, {"Content-Range": f"bytes */{len(content)}"})
            return
        key = hashlib.sha256(content).hexdigest()
        if len(content) > 1000 and self.hub.flipped[key] < faults.flips:
            self.hub.flipped[key] += 1
            content = content[:500] + bytes([content[500] ^ 1]) + content[501:]
        headers = {"Content-Length": str(len(content) - start), "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._head(206 if start else 200, headers | (extra or {}))
        if self.command != "HEAD":
            self._send(content[start:])

    def _send(self, content: bytes) -> None:
        faults, piece = self.hub.faults, 16 * 1024
        end = len(content)
        if cut := faults.cuts > 0 and faults.cut_after < end:
            faults.cuts -= 1
            end = faults.cut_after
        try:
            for at in range(0, end, piece):
                self.wfile.write(content[at : min(at + piece, end)])
                if faults.bytes_per_second:
                    time.sleep(piece / faults.bytes_per_second)
            if cut:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
        except OSError:
            self.close_connection = True  # the client was killed, as some tests want


def _blob_id(content: bytes) -> str:
    """git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _answer(data: object) -> dict[str, object]:
    return {"Code": 200, "Data": data, "Message": "success", "Success": True}
