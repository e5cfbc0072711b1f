"""`doctor` looks at the real machine; only what is broken on purpose is made up."""

import json
import socket
import stat
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import torch

from tunesmith.apps.cli import main
from tunesmith.apps.doctor import Check, examine

SECRET = "hunter2"


class _Hub(BaseHTTPRequestHandler):
    """Answers with the status its path asks for, and remembers the headers it was sent."""

    seen: list[str] = []  # noqa: RUF012  one list for the test's one server

    def do_GET(self) -> None:
        self.seen.append(str(self.headers))
        self.send_response(int(self.path.strip("/").partition("/")[0] or 200))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _Hub.seen.clear()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def network(hub: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """All three places are the local server; no proxy stands in between."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://{hub}")
    monkeypatch.setenv("HF_ENDPOINT", f"http://{hub}")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:{SECRET}@{hub}/401/simple")
    return hub


def _by_name() -> dict[str, Check]:
    return {check.name: check for check in examine()}


def test_a_working_machine_is_described(
    home: Path, network: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["doctor", "--json"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert code == 0
    assert torch.__version__.partition("+")[0] == checks["torch"]["found"].partition("+")[0]
    assert f"{psutil.virtual_memory().total / 1e9:.1f} GB" in checks["memory"]["found"]
    assert str(home) in checks["disk"]["found"]
    for name in ("modelscope", "huggingface", "package index", "xllamacpp", "python"):
        assert checks[name]["state"] == "good", checks[name]
    speeds = checks["processor"]["found"].replace(",", "").split()
    assert float(speeds[1]) > 1
    assert float(speeds[3]) > 0


def test_passwords_are_neither_shown_nor_sent(
    home: Path, network: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["doctor"])
    assert SECRET not in "".join(capsys.readouterr())
    assert len(_Hub.seen) == 3
    assert not any("authorization" in headers.lower() for headers in _Hub.seen)


def test_hubs_that_do_not_answer_are_notes_with_advice(
    home: Path, network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://{network}/503")
        checks = _by_name()
    assert (checks["huggingface"].state, checks["modelscope"].state) == ("note", "note")
    assert "HF_ENDPOINT" in checks["huggingface"].advice
    assert "HTTP 503" in checks["modelscope"].found


def test_a_home_that_cannot_be_written_is_bad(
    network: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", "/proc/tunesmith")
    assert main(["doctor"]) == 1
    assert "Set TUNESMITH_HOME" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch can use the GPU here")
def test_a_gpu_that_pytorch_cannot_use_is_bad(
    home: Path, network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559 MiB, 570.86'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    gpu = _by_name()["gpu"]
    assert gpu.state == "bad"
    assert "H100" in gpu.found
    assert torch.__version__ in gpu.found
    assert "pytorch.org" in gpu.advice
