"""Fixtures every test may use: an isolated home, and the one real model."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers_data import Save
from tests.hub_server import HubServer, running_hub
from tunesmith.models.store import LocalModel

if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    # Threads spin while they wait for one another: those of two workers must not share a core.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

os.environ["TUNESMITH_LANG"] = "en"  # messages are matched in English, on any machine


@pytest.fixture(autouse=True)
def main_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamlit's AppTest leaves its script behind as `__main__`, which child processes import."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of this test's own: no model is there, nothing is left behind."""
    folder = tmp_path / "home"
    monkeypatch.setenv("TUNESMITH_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def smollm2() -> LocalModel:
    """SmolLM2-135M-Instruct as GGUF, pulled for real, once, into the user's own home."""
    from tunesmith.models.hub import Ready, pull

    *_, last = pull("smollm2-135m")
    assert isinstance(last, Ready)
    return last.model


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A local hub that both real hub clients of this process talk to."""
    with running_hub(monkeypatch) as server:
        yield server


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a file of this name and content into the test's folder."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write
