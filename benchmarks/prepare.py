"""Time the preparation of training data: from a file of rows to samples, and the second start.

    python benchmarks/prepare.py 100 1000 10000 100000 1000000 [--model smollm2-135m]

Writes alpaca-like rows (about 150 tokens) as JSONL, prepares them in a fresh process with an empty
cache, then again in another. Memory, looked at twenty times a second: what the process that trains
grows by above its imports, torch among them, and what all its helpers have together.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

import psutil

from tunesmith.apps.figures import size
from tunesmith.paths import home

VOCABULARY = (
    "the of model data small large answer question river city time people water language write "
    "explain list three ways describe how create story about climate energy learn simple system "
    "number between reason because example health computer science music history world country "
    "improve process results common important different several during through without another "
)


def rows(count: int) -> Iterator[str]:
    """Alpaca-like rows, each with a question of its own, a third of them with an input."""
    rng, words = random.Random(0), VOCABULARY.split()

    def text(fewest: int, most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(fewest, most)))

    for number in range(count):
        answer = ". ".join(text(6, 16).capitalize() for _ in range(rng.randint(4, 13)))
        row = {
            "instruction": f"{text(6, 18)} {number}?",
            "input": "" if number % 3 else text(5, 30),
            "output": f"{answer}.",
        }
        yield json.dumps(row) + "\n"


class Memory:
    """Peaks in bytes while the block runs: what this process grew by, and its children's sum."""

    def __init__(self) -> None:
        self.own = self.helpers = 0
        self._done = Event()
        self._thread = Thread(target=self._look)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        process = psutil.Process()
        before = process.memory_info().rss
        while not self._done.wait(0.05):
            self.own = max(self.own, process.memory_info().rss - before)
            self.helpers = max(self.helpers, sum(map(_memory, process.children())))


def _memory(process: psutil.Process) -> int:
    try:
        found: int = process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0
    return found


def measure(file: Path, model: str) -> dict[str, Any]:
    """In this process: prepare the file, and tell how long it took and how much memory."""
    from tunesmith.config import TrainSettings
    from tunesmith.models.store import locate
    from tunesmith.models.tokenizer import load_tokenizer
    from tunesmith.training import train  # noqa: F401  # what a training imports anyway
    from tunesmith.training.prepare import prepare

    tokenizer = load_tokenizer(locate(model))
    with Memory() as memory:
        begun = time.perf_counter()
        prepared = prepare(TrainSettings(data=(file,)), tokenizer)
        assert prepared.fingerprint
        seconds = time.perf_counter() - begun
    return {
        "seconds": seconds,
        "memory": memory.own,
        "helpers": memory.helpers,
        "tokens": prepared.train.tokens,
        "samples": len(prepared.train),
    }


def in_child(file: Path, model: str, cache: Path) -> dict[str, Any]:
    """`measure` in a process of its own, whose home is `cache` with the models of this one."""
    cache.mkdir(exist_ok=True)
    if not (cache / "models").exists() and (home() / "models").exists():
        (cache / "models").symlink_to(home() / "models")
    done = subprocess.run(
        [sys.executable, __file__, "--measure", str(file), "--model", model],
        env={**os.environ, "TUNESMITH_HOME": str(cache)},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Print a line of the table for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int, nargs="*", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--measure", type=Path)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure, given.model)))
        return
    print("| rows | tokens a row | seconds | rows/s | second start, s | memory | of its helpers |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with TemporaryDirectory() as name:
        folder = Path(name)
        few = folder / "few.jsonl"
        few.write_text("".join(rows(100)), "utf-8")
        in_child(few, given.model, folder / "few")  # the imports come from the disk only once
        for count in given.rows:
            file = folder / f"{count}.jsonl"
            with file.open("w", encoding="utf-8") as out:
                out.writelines(rows(count))
            first, second = (in_child(file, given.model, folder / str(count)) for _ in range(2))
            print(
                f"| {count:,} | {first['tokens'] / first['samples']:.0f} "
                f"| {first['seconds']:.2f} | {count / first['seconds']:,.0f} "
                f"| {second['seconds']:.2f} | {size(first['memory'])} | {size(first['helpers'])} |",
                flush=True,
            )
            file.unlink()


if __name__ == "__main__":
    main()
