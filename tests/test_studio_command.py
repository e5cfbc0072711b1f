"""`tunesmith studio` serves the page, and not to the world by accident."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.error import URLError

import pytest

from tests.helpers_browser import free_port
from tunesmith.apps.cli import main

TUNESMITH = str(Path(sys.executable).with_name("tunesmith"))


def test_the_page_is_served_until_ctrl_c(home: Path, tmp_path: Path) -> None:
    port = free_port()
    server = subprocess.Popen(
        [TUNESMITH, "studio", "--port", str(port)],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert server.stdout is not None
    try:
        assert server.stdout.readline() == (
            f"The page is at http://127.0.0.1:{port}; Ctrl-C ends it.\n"
        )
        assert fetch(f"http://127.0.0.1:{port}/_stcore/health") == "ok"
        listening = [address for address in listeners(server.pid) if not address.startswith("127.")]
        assert not listening
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "my-machine"])
def test_other_machines_are_not_let_in_without_a_password(
    host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(os.environ, "TUNESMITH_PASSWORD", raising=False)
    assert main(["studio", "--host", host]) == 2
    assert "set a password in TUNESMITH_PASSWORD first" in capsys.readouterr().err


def test_a_port_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["studio", "--port", "70000"]) == 2
    assert "--port 70000 is out of range" in capsys.readouterr().err


def fetch(address: str, seconds: float = 60) -> str:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(address) as reply:
                text: str = reply.read().decode()
                return text
        except URLError:
            assert time.monotonic() < end, "no page came"
            time.sleep(0.1)


def listeners(pid: int) -> list[str]:
    import psutil

    connections = psutil.Process(pid).net_connections("tcp")
    return [one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN]
