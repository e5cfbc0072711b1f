"""What the hub tests share: a small repository, and a pull in a process of its own."""

import os
import random
import subprocess
import sys
from pathlib import Path

from tests.hub_server import HubServer
from tunesmith.models.hub import Ready, pull
from tunesmith.models.store import LocalModel

REPO = "maker/small-model"
WEIGHTS = 400_000  # bytes

_PULL = """
import sys
from tunesmith.models.hub import Ready, pull
for event in pull(sys.argv[1]):
    print(event, flush=True)
"""


def repository(folder: Path, *, seed: int = 0, size: int = WEIGHTS) -> Path:
    """A model folder as hubs hold them: what we want, and what we must not take."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}' + " " * 2000)
    (folder / "LICENSE").write_text("Apache License")
    (folder / "README.md").write_text("# model")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "model.safetensors").write_bytes(random.Random(seed).randbytes(size))
    return folder


def pulled(spec: str, *, update: bool = False) -> LocalModel:
    """The model that a whole pull ends with."""
    *_, last = pull(spec, update=update)
    assert isinstance(last, Ready)
    return last.model


def pull_process(spec: str, hub: HubServer, home: Path) -> "subprocess.Popen[str]":
    """The same pull in another process."""
    env = os.environ | hub.env() | {"TUNESMITH_HOME": str(home)}
    return subprocess.Popen(
        [sys.executable, "-c", _PULL, spec], env=env, stdout=subprocess.PIPE, text=True
    )


def partial_file(home: Path) -> Path | None:
    """The weights while they grow."""
    # The small files beside them come and go meanwhile.
    return next(home.glob("models/.*.part/partial/*-model.safetensors"), None)
