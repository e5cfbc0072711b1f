"""What this machine can do, looked at and measured, and what to do about what is missing."""

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from tempfile import TemporaryFile
from typing import Literal
from urllib.parse import urlsplit

from tunesmith import paths
from tunesmith.language import t
from tunesmith.machine import cores

GB = 10**9
ENOUGH_MEMORY = 3 * GB  # the packaged model trains in less
ENOUGH_DISK = 5 * GB
HUB_SECONDS = 4.0
CHILD_SECONDS = 60.0

State = Literal["good", "note", "bad"]


@dataclass(frozen=True)
class Check:
    """One thing looked at. `bad`: tunesmith cannot work without it; `note`: it can, but less."""

    name: str
    state: State
    found: str
    advice: str = ""


def examine() -> Iterator[Check]:
    """Every check, side by side, but the measurement, which wants the machine to itself.

    Asking a hub sends one request without any token.
    """
    checks: tuple[Callable[[], list[Check]], ...] = (
        _python, _graphics, _memory, _disk, _libraries, _hubs,
    )  # fmt: skip
    with ThreadPoolExecutor(len(checks)) as pool:
        jobs = [pool.submit(copy_context().run, check) for check in checks]
        for job in jobs:
            yield from job.result()
    yield _arithmetic()


def _python() -> list[Check]:
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    return [Check("python", "good", found)]


def _graphics() -> list[Check]:
    cards = _nvidia_cards()
    if not cards:
        return [
            Check(
                "gpu",
                "note",
                t("no NVIDIA GPU"),
                t("Small models train on the processor; for 7B and up use a machine with a GPU."),
            )
        ]
    import torch

    if torch.cuda.is_available():
        return [Check("gpu", "good", card) for card in cards]
    return [
        Check(
            "gpu",
            "bad",
            t(
                "{card}, but PyTorch {version} cannot use it",
                card=cards[0],
                version=torch.__version__,
            ),
            t("Install the PyTorch build for your driver: https://pytorch.org/get-started/locally"),
        )
    ]


def _nvidia_cards() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _memory() -> list[Check]:
    import psutil

    memory = psutil.virtual_memory()
    found = t(
        "{free} free of {total}; {cores} processor cores",
        free=_gb(memory.available),
        total=_gb(memory.total),
        cores=cores(),
    )
    if memory.available >= ENOUGH_MEMORY:
        return [Check("memory", "good", found)]
    advice = t("Training needs about {need} free; close other programs.", need=_gb(ENOUGH_MEMORY))
    return [Check("memory", "note", found, advice)]


def _disk() -> list[Check]:
    home = paths.home()
    nearest = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(nearest).free
    found = t("{free} free for {path}", free=_gb(free), path=home)
    try:
        with TemporaryFile(dir=nearest):
            pass
    except OSError:
        advice = t("Set TUNESMITH_HOME to a folder that you can write.")
        return [Check("disk", "bad", t("{path} cannot be written", path=nearest), advice)]
    if free >= ENOUGH_DISK:
        return [Check("disk", "good", found)]
    advice = t("A 7B model takes 15 GB; free some, or set TUNESMITH_HOME to a larger disk.")
    return [Check("disk", "note", found, advice)]


def _libraries() -> list[Check]:
    """Importing in a child: a broken build may end the process that loads it."""
    names = ("torch", "transformers", "peft", "xllamacpp")
    return [_library(name) for name in names]


def _library(name: str) -> Check:
    try:
        found = version(name)
    except PackageNotFoundError:
        advice = t("Run: {command}", command=f"{sys.executable} -m pip install tunesmith")
        return Check(name, "bad", t("not installed"), advice)
    if name != "xllamacpp":
        return Check(name, "good", found)
    child = [sys.executable, "-c", f"import {name}"]
    done = subprocess.run(child, capture_output=True, timeout=CHILD_SECONDS, check=False)
    if done.returncode == 0:
        return Check(name, "good", found)
    reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [""]
    advice = t("Chat falls back to transformers, which is slower: --engine hf.")
    return Check(name, "note", t("does not load: {reason}", reason=reason[0]), advice)


def _arithmetic() -> Check:
    import torch

    speeds = {dtype: _gflops(dtype) for dtype in (torch.float32, torch.bfloat16)}
    full, half = speeds[torch.float32], speeds[torch.bfloat16]
    found = t("float32 {full:,.0f}, bfloat16 {half:,.0f} GFLOP/s", full=full, half=half)
    return Check("processor", "good", found)


def _gflops(dtype: object, size: int = 1024, repeats: int = 3) -> float:
    """The best of a few square matrix products, in 10⁹ operations a second."""
    import torch

    x = torch.ones(size, size, dtype=dtype)  # type: ignore[call-overload]
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        x @ x
        best = min(best, time.perf_counter() - start)
    return float(2 * size**3 / best / 1e9)


def _hubs() -> list[Check]:
    from tunesmith.models.huggingface import HuggingFace
    from tunesmith.models.modelscope import ModelScope

    places = {
        "modelscope": (
            ModelScope().endpoint,
            t("Behind a proxy, set HTTPS_PROXY; MODELSCOPE_ENDPOINT names another site."),
        ),
        "huggingface": (
            HuggingFace().endpoint,
            t("Behind a proxy, set HTTPS_PROXY; HF_ENDPOINT names a mirror."),
        ),
        "package index": (
            _package_index(),
            t("Set a mirror with: pip config set global.index-url URL"),
        ),
    }
    with ThreadPoolExecutor(len(places)) as pool:
        jobs = [
            pool.submit(copy_context().run, _reach, name, url, advice)
            for name, (url, advice) in places.items()
        ]
        return [job.result() for job in jobs]


def _reach(name: str, url: str, advice: str) -> Check:
    """One request. Any answer but a refusal will do: the index may want a password."""
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]  # a password in the URL is neither sent nor shown
    start = time.perf_counter()
    try:
        with urlopen(
            Request(f"{parts.scheme}://{host}{parts.path}", headers={"User-Agent": "tunesmith"}),
            timeout=HUB_SECONDS,
        ):
            pass
    except HTTPError as error:
        if error.code not in (401, 404):
            answer = t("{host} answers HTTP {code}", host=host, code=error.code)
            return Check(name, "note", answer, advice)
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Check(name, "note", t("{host}: {reason}", host=host, reason=reason), advice)
    seconds = time.perf_counter() - start
    return Check(name, "good", t("{host} answers in {seconds:.1f} s", host=host, seconds=seconds))


def _package_index() -> str:
    """The index pip uses here: its environment variable, its settings, or PyPI."""
    if chosen := os.environ.get("PIP_INDEX_URL"):
        return chosen
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=CHILD_SECONDS, check=False
    )
    return done.stdout.strip() or "https://pypi.org/simple"


def _gb(count: float) -> str:
    return f"{count / GB:.1f} GB"
