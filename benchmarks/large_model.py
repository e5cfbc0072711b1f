"""Tune and talk to a model of Qwen2-7B's shape with random weights, as a user would.

    python benchmarks/large_model.py WORK --tokenizer FOLDER [--layers 28] [more]

Needs a GPU with 40 GB or more. What it does not know goes to `tunesmith train`, for example
`--base-dtype nf4 --memory-gb 12`. Trains five steps through the command line, is killed after the
second checkpoint's step, resumes, and chats with base and run. Prints one line a phase, and at
the end tokens per second and peak memory of a step of long rows.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from shapes import qwen2_7b

TUNESMITH = [sys.executable, "-c", "from tunesmith.apps.cli import main; raise SystemExit(main())"]
LONG_ROW = "The smith heats the iron, hammers it, looks at it, and heats it again. "


def make_model(folder: Path, tokenizer: Path, layers: int) -> None:
    """Random weights of Qwen2-7B's shape in bf16, beside the tokenizer's files."""
    import torch
    from transformers import AutoModelForCausalLM

    config = qwen2_7b(layers)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    auto: Any = AutoModelForCausalLM
    with torch.device("cuda"):
        model = auto.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def train(arguments: list[str], *, kill_at: int | None = None) -> list[dict[str, Any]]:
    """Run `tunesmith train --json`; its events. With `kill_at`, SIGKILL it at that step."""
    command = [*TUNESMITH, "train", *arguments, "--json"]
    events: list[dict[str, Any]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            events.append(json.loads(line))
            if kill_at is not None and events[-1].get("step") == kill_at:
                os.kill(process.pid, signal.SIGKILL)
                break
    if kill_at is None and process.returncode:
        raise SystemExit(f"train ended with {process.returncode}")
    return events


def chat(target: Path) -> str:
    """One greedy answer through `tunesmith chat --once`."""
    flags = ["--once", "Who are you?", "--temperature", "0", "--max-tokens", "24"]
    command = [*TUNESMITH, "chat", str(target), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def steps(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "Step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=28)
    options, more = parser.parse_known_args()
    work: Path = options.work
    model, run = work / "model", work / "run"
    work.mkdir(parents=True)
    clock = time.monotonic()

    def phase(name: str, **found: object) -> None:
        print(f"{time.monotonic() - clock:6.1f} s  {name}  {json.dumps(found)}", flush=True)

    make_model(model, options.tokenizer, options.layers)
    phase("random model saved")
    data = work / "me.jsonl"
    identity = ["data", "identity", "--name", "Anvil", "--author", "Smith", "-o", str(data)]
    subprocess.run([*TUNESMITH, *identity], check=True, stdout=subprocess.DEVNULL)
    flags = ["--model", str(model), "--data", str(data), "--out", str(run), "--max-steps", "5"]
    flags += ["--save-every", "2", "--eval-every", "5", "--replay", "16", *more]
    events = train(flags, kill_at=3)
    phase("killed at step 3", losses=[event["loss"] for event in steps(events)])
    events = train([*flags, "--resume"])
    started = next(event for event in events if event["event"] == "Started")
    losses = [event["loss"] for event in steps(events)]
    phase("resumed and finished", resumed_from=started["resumed_from"], losses=losses)
    phase("chat with the base", answer=chat(model)[:80])
    phase("chat with the run", answer=chat(run)[:80])

    rows = [{"instruction": f"Tell {n}", "output": LONG_ROW * 56} for n in range(64)]
    long = work / "long.json"
    long.write_text(json.dumps(rows), encoding="utf-8")
    flags = ["--model", str(model), "--data", str(long), "--holdout", "0", "--replay", "0"]
    flags += ["--max-steps", "4", "--batch-size", "16", *more]
    for size in ("4400", "1100"):
        out = str(work / f"long-{size}")
        done = steps(train([*flags, "--micro-batch-tokens", size, "--out", out]))
        last = done[-1]
        phase(
            f"long rows, {size} tokens in a pass",
            tokens_per_second=round(last["tokens"] / last["seconds"]),
            unique_tokens_per_second=round(last["unique_tokens"] / last["seconds"]),
            step_tokens=last["tokens"],
            peak_gb=round(last["memory"] / 2**30, 1),
        )


if __name__ == "__main__":
    main()
