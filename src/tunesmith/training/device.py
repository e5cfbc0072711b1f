"""Where to train and in which arithmetic, decided by looking and by a short measurement."""

import os
import time
from functools import cache
from importlib.util import find_spec

import torch

from tunesmith.config import TrainSettings
from tunesmith.errors import TrainingError
from tunesmith.language import t
from tunesmith.models.nf4 import Nf4Linear

# These begin by moving a part of the base's weights into the adapter.
MOVES_THE_BASE = ("pissa", "olora")


def choose_device(wanted: str) -> torch.device:
    """The device asked for, or the best there is.

    Raises:
        TrainingError: The device asked for is not here.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        wanted = next(name for name, here in available.items() if here)
    if not available[wanted]:
        raise TrainingError(
            t("--device {device}: PyTorch finds no such device here; leave the flag out or see "
              "`tunesmith doctor`.", device=wanted)
        )  # fmt: skip
    # Some of PyTorch's functions for a GPU's memory want to hear which.
    return (
        torch.device(wanted, torch.cuda.current_device())
        if wanted == "cuda"
        else torch.device(wanted)
    )


def choose_dtype(settings: TrainSettings, device: torch.device) -> torch.dtype:
    """The arithmetic asked for; else bf16 on a GPU, and on a CPU where it measures faster."""
    if settings.dtype != "auto":
        return {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float64": torch.float64,
        }[settings.dtype]
    faster = device.type == "cuda" or (device.type == "cpu" and _bfloat16_wins())
    return torch.bfloat16 if faster else torch.float32


def computes_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights in bf16 are better multiplied in float32: on a CPU slower in bf16."""
    return device.type == "cpu" and dtype == torch.bfloat16 and not _bfloat16_wins()


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels can run: on an NVIDIA GPU, in bf16, where Triton came with PyTorch."""
    return can_compile(device) and dtype == torch.bfloat16 and torch.version.hip is None


def can_compile(device: torch.device) -> bool:
    """Whether PyTorch's compiler has something to gain: on a GPU that Triton knows."""
    return device.type == "cuda" and find_spec("triton") is not None


def require_machine(settings: TrainSettings) -> None:
    """Refuse what this machine cannot do, before anything is read or made.

    Raises:
        TrainingError: A device, a compiler or an arithmetic is asked for that is not here.
    """
    device = choose_device(settings.device)
    if settings.compile and not can_compile(device):
        raise TrainingError(t("--compile is for a GPU that Triton knows; leave the flag out here."))
    match settings.base_dtype:
        case "fp8":
            _require_fp8(settings, device)
        case "nf4":
            _require_nf4(settings, device)


def keep_few_kernels() -> None:
    """Let oneDNN keep its code for 128 shapes of products, not 1,024; only before the first one.

    It makes some for every shape, and packs are ever of other lengths. What it keeps comes to lie
    between activations, and the holes that those leave get too small for others: after six steps
    a model of 135M held 3.3 GB in place of 2.6. A pass meets about 60 shapes; had it to make them
    again for each layer, it would take longer.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def _require_fp8(settings: TrainSettings, device: torch.device) -> None:
    kernels = device.type == "cuda" and has_kernels(device, choose_dtype(settings, device))
    if not kernels or torch.cuda.get_device_capability(device) < (9, 0):
        raise TrainingError(
            t("--base-dtype fp8 needs an NVIDIA GPU of the Hopper generation or newer, and "
              "--dtype bfloat16; leave the flag out here.")
        )  # fmt: skip
    if settings.use_dora or settings.lora_dropout:
        raise TrainingError(
            t("--base-dtype fp8 goes with neither --use-dora nor --lora-dropout; leave them out.")
        )


def _require_nf4(settings: TrainSettings, device: torch.device) -> None:
    if settings.use_dora or settings.init_lora in MOVES_THE_BASE or settings.dtype == "float64":
        raise TrainingError(
            t("--base-dtype nf4 goes with none of --use-dora, --init-lora pissa or olora, and "
              "--dtype float64; leave them out.")
        )  # fmt: skip
    if find_spec("bitsandbytes") is None:
        raise TrainingError(
            t("--base-dtype nf4 needs bitsandbytes: pip install 'tunesmith[qlora]'; or leave the "
              "flag out.")
        )  # fmt: skip
    try:
        with torch.no_grad():
            Nf4Linear.of(torch.nn.Linear(64, 2, device=device))(torch.ones(1, 64, device=device))
    except (ImportError, OSError, RuntimeError) as error:
        raise TrainingError(
            t("--base-dtype nf4: bitsandbytes does not work on {device} here ({reason}); leave the "
              "flag out.", device=device.type, reason=str(error).split("\n")[0])
        ) from error  # fmt: skip


@cache
def _bfloat16_wins(rounds: int = 5) -> bool:
    """Whether a matrix product of a layer's shape is clearly faster in bf16.

    The processor's flags do not tell: some have the instruction and are slower with it. One
    thread's own time is taken, since on the clock a busy neighbour would decide.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = [(_seconds(torch.float32), _seconds(torch.bfloat16)) for _ in range(rounds)]
    finally:
        torch.set_num_threads(threads)
    float32 = min(one for one, _ in times)
    bfloat16 = min(other for _, other in times)
    return bfloat16 * 1.3 < float32


def _seconds(dtype: torch.dtype) -> float:
    x = torch.ones(512, 1024, dtype=dtype)
    weight = torch.ones(1024, 1024, dtype=dtype)
    start = time.thread_time()
    torch.nn.functional.linear(x, weight)
    return time.thread_time() - start
