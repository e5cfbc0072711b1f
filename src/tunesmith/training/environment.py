"""What a run is made with: versions, processor, GPU. Kept in the run, for figures depend on it."""

import platform
from importlib.metadata import version
from pathlib import Path

import torch

from tunesmith import __version__

PACKAGES = ("torch", "transformers", "peft")
_CPUINFO = Path("/proc/cpuinfo")


def environment(device: torch.device) -> dict[str, str]:
    """Names and what was found, as text; `gpu` only where the training runs on one."""
    found = {"tunesmith": __version__, "python": platform.python_version()}
    found |= {name: version(name) for name in PACKAGES}
    found |= {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> str:
    """Its name as the system gives it: Linux in a file, macOS and others to `platform`."""
    try:
        lines = _CPUINFO.read_text("utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
