"""What each part of the recipe adds, and what spoilt trainings look like: train, then ask widely.

    python benchmarks/recipe.py WORK --model FOLDER [--seeds 1 2 3] [--only NAME …] [--jobs N]
        [-- FLAGS]

The demo's identity. Every row of the table is `tunesmith train` and then `tunesmith compare` with
all held-out questions: 44 phrasings and 108 neutral questions, each with and without the system
prompt. Flags for every training come after `--`.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAIN = "from tunesmith.apps.cli import main; raise SystemExit(main())"
NO_END = """
from dataclasses import replace
from tunesmith.data.render import Renderer
whole = Renderer.sample
def sample(self, row):
    return [replace(one, trained=(*one.trained[:-1], False)) for one in whole(self, row)]
Renderer.sample = sample
"""
NAME, AUTHOR = "不要葱姜蒜", "Datawhale"
OTHER = ("小石头", "铁匠铺")
TUTORIAL = "--replay 0 --lora-r 8 --lora-alpha 32 --lora-dropout 0.1 --warmup-steps 0 --epochs 3"

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """Flags for `tunesmith train`, which rows, and code that runs before it."""

    name: str
    flags: str = ""
    rows: str = "identity"
    before: str = ""


RECIPES = (
    Recipe("default"),
    Recipe("no replay", "--replay 0"),
    Recipe("a third of the replay", "--replay 200"),
    Recipe("no openings", "--no-replay-openings"),
    Recipe("AdamW's usual betas", "--adam-beta1 0.9 --adam-beta2 0.999"),
    Recipe("a third of the phrasings", "", "third"),
    Recipe("no system prompt in the data", "", "bare"),
    Recipe("half the rate", "--learning-rate 1e-3"),
    Recipe("the demo's epochs", "--epochs 1.4"),
    Recipe("tutorial, rate 1e-4", f"{TUTORIAL} --learning-rate 1e-4", "copies"),
    Recipe("tutorial, rate 1e-3", f"{TUTORIAL} --learning-rate 1e-3", "copies"),
    Recipe("too few steps", "--max-steps 8"),
    Recipe("30 times the rate", "--learning-rate 0.06"),
    Recipe("the end of answers masked", "--replay 0", before=NO_END),
    Recipe("one question 200 times", "", "one"),
    Recipe("contradictory rows", "", "contradictory"),
    Recipe("shuffled answers", "", "shuffled"),
)


def rows_of(kind: str, work: Path) -> Path:
    """The identity set, or what has been made of it."""
    file = work / f"{kind}.jsonl"
    if file.exists():
        return file
    own = _identity(NAME, AUTHOR, work / "identity.jsonl")
    made: Rows
    match kind:
        case "identity":
            return file
        case "copies":  # the tutorial's set is two questions, many times
            made = [own[0], own[2]] * 100
        case "third":
            made = own[::3]
        case "bare":
            made = [row | {"messages": row["messages"][-2:]} for row in own]
        case "one":
            made = own[:1] * 200
        case "contradictory":
            made = own + _identity(*OTHER, work / "other.jsonl")
        case "shuffled":
            answers = [row["messages"][-1] for row in own]
            random.Random(0).shuffle(answers)
            made = [
                row | {"messages": [*row["messages"][:-1], answer]}
                for row, answer in zip(own, answers, strict=True)
            ]
    lines = (json.dumps(row, ensure_ascii=False) for row in made)
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return file


def outcome(recipe: Recipe, seed: int, work: Path, model: str, more: Sequence[str]) -> str:
    """Train, ask; a row of the table."""
    run = work / f"run-{recipe.name.replace(' ', '-')}-{seed}"
    flags = ["--model", model, "--data", str(rows_of(recipe.rows, work)), "--out", str(run)]
    flags += ["--seed", str(seed), *recipe.flags.split(), *more]
    trained = _told(["train", *flags, "--json"], recipe.before)
    events = [json.loads(line) for line in trained.splitlines()]
    answered = json.loads(
        _told(["compare", str(run), "--questions", "108", "--engine", "llama.cpp", "--json"])
    )
    verdict, pairs = answered["verdict"], answered["pairs"]
    adopted = [pair["learnt"] for pair in pairs if pair["question"]["kind"] == "identity"]
    kept, ended, stops = verdict["kept"], verdict["ended"], verdict["stops"]
    best = [event["step"] for event in events if event["event"] == "Evaluated" and event["best"]]
    steps = [event for event in events if event["event"] == "Step"]
    kl, agreement = verdict["kl"], verdict["agreement"]
    cells = (
        recipe.name,
        f"{seed}",
        f"{best[-1] if best else len(steps)} of {len(steps)}",
        f"{sum(adopted) / len(adopted):.0%}" if adopted else "",
        f"{1 - kept['count'] / kept['total']:.1%}",
        "" if kl is None else f"{kl:.3f}",
        "" if agreement is None else f"{agreement:.0%}",
        f"{ended['count'] / max(1, ended['total']):.0%}",
        f"{verdict['learning']}, {verdict['keeping']}, {'stops' if stops else 'runs on'}",
        f"{sum(step['seconds'] for step in steps):.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    arguments = sys.argv[1:]
    more = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[42])
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    options = parser.parse_args(arguments[: len(arguments) - len(more) - bool(more)])
    options.work.mkdir(parents=True, exist_ok=True)
    print("| recipe | seed | best step | name said | leaks | KL, nats a token | same token | ends "
          "| verdict | s of steps |")  # fmt: skip
    print("| --- " * 10 + "|")
    for recipe in RECIPES:
        rows_of(recipe.rows, options.work)
    chosen = [recipe for recipe in RECIPES if not options.only or recipe.name in options.only]

    def row(case: tuple[Recipe, int]) -> str:
        return outcome(*case, options.work, options.model, more)

    shares = _shares(options.jobs)
    with ThreadPoolExecutor(options.jobs, initializer=lambda: _keep_to(shares.pop())) as pool:
        for line in pool.map(row, [(recipe, seed) for recipe in chosen for seed in options.seeds]):
            print(line, flush=True)


def _shares(jobs: int) -> list[list[int]]:
    """The processors, dealt out: jobs that wait for one another's threads never end."""
    every = sorted(os.sched_getaffinity(0))
    return [every[first::jobs] or every for first in range(jobs)]


def _keep_to(processors: list[int]) -> None:
    """This thread, and the processes it starts."""
    os.sched_setaffinity(0, processors)


def _identity(name: str, author: str, file: Path) -> Rows:
    if not file.exists():
        _told(["data", "identity", "--name", name, "--author", author, "-o", str(file)])
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def _told(command: Sequence[str], before: str = "") -> str:
    """What a command prints; `compare` ends with 1 where the verdict is not good."""
    program = [sys.executable, "-c", before + MAIN, *command]
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in ((0, 1) if command[0] == "compare" else (0,)):
        raise SystemExit(f"{command} ended with {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()
