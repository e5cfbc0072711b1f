"""How the cost of training grows: measure it, then draw it for docs/benchmarks.md.

    python benchmarks/curves.py measure    writes docs/curves.json
    python benchmarks/curves.py draw       docs/curves.json → docs/images/curves.svg

Three curves, on the packaged model: seconds and memory of reading and rendering a data set against
its rows; seconds of a step against the length of its rows, the tokens the same; seconds of a step
against the share of its tokens that is unique. Rows are random, so that nothing else is shared.
"""

import json
import random
import resource
import statistics
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tunesmith.config import TrainSettings
from tunesmith.data.packs import Sample, pack
from tunesmith.models.store import locate
from tunesmith.models.weights import load_model
from tunesmith.training.device import choose_device, choose_dtype
from tunesmith.training.forward import (
    ATTENTION,
    arithmetic,
    pack_loss,
    prove_packing,
    register_attention,
)
from tunesmith.training.lora import add_lora
from tunesmith.training.setup import read_inputs

RESULTS = Path(__file__).parents[1] / "docs" / "curves.json"
PICTURE = RESULTS.parent / "images" / "curves.svg"
MODEL = "smollm2-135m"
SIZES = (1_000, 4_000, 16_000)  # rows of a data set
LENGTHS = (32, 64, 128, 256, 512, 1024)
SHARED = (0, 32, 64, 96, 112, 120)  # tokens that 16 rows of 128 begin with
TOKENS = 1024  # a step, where lengths are compared
STEPS = 3
WORDS = ("iron", "smith", "anvil", "hammer", "fire", "water", "wood", "stone", "river", "night")

Points = list[dict[str, float]]


def measure() -> None:
    device = choose_device("auto")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    found = {
        "machine": f"{name}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}",
        "rows": [_apart(size) for size in SIZES],
        **_steps(device),
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def draw() -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"  # letters stay letters
    from matplotlib import pyplot

    found = json.loads(RESULTS.read_text("utf-8"))
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    _line(left, found["rows"], "rows", "seconds", "rows in the data set", "seconds to prepare")
    beside = left.twinx()
    _line(beside, found["rows"], "rows", "peak_mb", "", "peak MB", color="tab:orange")
    _line(middle, found["length"], "length", "per_token", "tokens in a row", "ms a token")
    left.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    middle.set_xscale("log", base=2)
    _line(right, found["sharing"], "unique", "seconds", "unique share of tokens", "seconds a step")
    figure.suptitle(found["machine"], fontsize=9)
    figure.savefig(PICTURE, metadata={"Date": None})


def _line(
    axes: Any, points: Points, x: str, y: str, xlabel: str, ylabel: str, color: str = "tab:blue"
) -> None:
    axes.plot([point[x] for point in points], [point[y] for point in points], "o-", color=color)
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    axes.yaxis.label.set_color(color)


def _apart(size: int) -> dict[str, float]:
    """Preparing `size` rows, in a process of its own: memory is a peak."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_prepared, (size,))


def _prepared(size: int) -> dict[str, float]:
    rng = random.Random(size)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(count))

    rows = (json.dumps({"instruction": words(20), "output": words(80)}) for _ in range(size))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        with file.open("w", encoding="utf-8") as written:
            written.writelines(row + "\n" for row in rows)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun = time.perf_counter()
        read_inputs(TrainSettings(model=MODEL, data=(file,)))
        seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"rows": size, "seconds": seconds, "peak_mb": peak / 1024}


def _steps(device: torch.device) -> dict[str, Points]:
    register_attention()
    dtype = choose_dtype(TrainSettings(), device)
    base = load_model(locate(MODEL), dtype=dtype, device=device, attention=ATTENTION)
    model = add_lora(base, TrainSettings())
    rng = random.Random(0)
    length, sharing = [], []
    for size in LENGTHS:
        seconds, _ = _timed(model, _samples(rng, TOKENS // size, size, 0))
        length.append({"length": size, "per_token": 1000 * seconds / TOKENS})
    for shared in SHARED:
        seconds, unique = _timed(model, _samples(rng, 16, 128, shared))
        sharing.append({"unique": unique, "seconds": seconds})
    return {"length": length, "sharing": sharing}


def _samples(rng: random.Random, count: int, length: int, shared: int) -> list[Sample]:
    def ids(size: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1000, 40_000) for _ in range(size))

    start = ids(shared)
    asked = max(shared, length // 2)
    trained = (False,) * asked + (True,) * (length - asked)
    return [Sample(start + ids(length - shared), trained) for _ in range(count)]


def _timed(model: Any, samples: list[Sample]) -> tuple[float, float]:
    """Seconds forward and backward, after one that warms up; unique tokens over all."""
    head = prove_packing(model.get_base_model(), samples[:2])
    model.train()
    times = []
    for _ in range(1 + STEPS):
        begun = time.perf_counter()
        packed = pack(samples)
        with arithmetic(model.get_base_model()):
            loss = pack_loss(model, packed, head) / packed.weight
        torch.autograd.backward(loss)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
        model.zero_grad()
    return statistics.median(times[1:]), len(packed.tokens) / packed.real_tokens


if __name__ == "__main__":
    {"measure": measure, "draw": draw}[sys.argv[1]]()
