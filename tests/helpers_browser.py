"""The page in a real browser, served by a real server."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import psutil
import pytest
from playwright.sync_api import Browser, sync_playwright

TUNESMITH = str(Path(sys.executable).with_name("tunesmith"))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def chromium() -> Iterator[Browser]:
    """Headless Chromium; where there is none the test is skipped, but not in CI."""
    here = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        if here is None and not Path(playwright.chromium.executable_path).exists():
            assert "CI" not in os.environ, "there is no browser; `make test` installs one"
            pytest.skip("no browser is here; `make test` installs one")
        # As root, as in a container, it has no sandbox of its own.
        yield playwright.chromium.launch(executable_path=here, args=["--no-sandbox"])


class Server:
    """`tunesmith studio` in a folder, on a port that stays when it is started again."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self._port = port
        self.address = f"http://127.0.0.1:{port}"
        self.start()

    def start(self) -> None:
        """Serve; returns once the page answers."""
        self.process = subprocess.Popen(
            [TUNESMITH, "studio", "--port", str(self._port)],
            cwd=self._folder, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until(self._answers, "no page came")

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)

    def engine_time(self) -> float:
        """Seconds of processor time that the model's engine has used so far."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        times = (child.cpu_times() for child in children)
        return float(sum(one.user + one.system for one in times))

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/_stcore/health") as reply:
                return bool(reply.read() == b"ok")
        except URLError:
            return False


def wait_until(condition: Callable[[], bool], otherwise: str, seconds: float = 120) -> None:
    """Look again and again; fails with `otherwise` when the time is over."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, otherwise
        time.sleep(0.05)
