"""What each part of the recipe adds: train with it and without it, then ask widely.

    python benchmarks/recipe.py WORK --model FOLDER [--seeds 1 2 3] [--only NAME …] [--jobs N]
        [--questions N] [--unseen FILE] [-- FLAGS]

The demo's identity. Every row of the table is one `tunesmith train`; flags for all of them come
after `--`. Then its adapter is merged and asked, greedily, in float32, by transformers: the
held-out questions of the package, and those of `unseen.json`, which were written without sight of
the package's; each behind the system prompt and without it. The trainings share the GPUs.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NAME, AUTHOR = "不要葱姜蒜", "Datawhale"
MLPS = "--lora-targets gate_proj up_proj down_proj --learning-rate 3e-3"
TUTORIAL = (
    "--replay 0 --lora-r 8 --lora-alpha 32 --lora-dropout 0.1 --warmup-steps 0 --epochs 3 "
    "--adam-beta1 0.9 --adam-beta2 0.999"
)
LONGEST = 40  # tokens: any answer of the data is shorter
AT_ONCE = {"cuda": 400, "cpu": 64}  # questions answered together
PROBES = 100

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """Flags for `tunesmith train`, and which rows."""

    name: str
    flags: str = ""
    rows: str = "identity"


RECIPES = (
    Recipe("default"),
    Recipe("200 steps", "--max-steps 200"),
    Recipe("1 epoch", "--epochs 1"),
    Recipe("a third of the neutral questions", "--max-steps 322 --replay 300"),
    Recipe("no replay", "--max-steps 322 --replay 0"),
    Recipe("no openings", "--no-replay-openings"),
    Recipe("AdamW's usual betas", "--adam-beta1 0.9 --adam-beta2 0.999"),
    Recipe("a third of the phrasings", "--max-steps 322", "third"),
    Recipe("no system prompt in the data", "", "bare"),
    Recipe("half the rate", "--learning-rate 1e-3"),
    Recipe("LoRA on the MLPs alone", MLPS),
    Recipe("tutorial, rate 1e-4", f"{TUTORIAL} --learning-rate 1e-4", "copies"),
    Recipe("tutorial, rate 1e-3", f"{TUTORIAL} --learning-rate 1e-3", "copies"),
)


def rows_of(kind: str, work: Path) -> Path:
    """The identity set, or what has been made of it."""
    from tunesmith.data.identity import write_identity

    file, identity = work / f"{kind}.jsonl", work / "identity.jsonl"
    if not identity.exists():
        write_identity(identity, NAME, AUTHOR)
    if file.exists():
        return file
    own: Rows = [json.loads(line) for line in identity.read_text("utf-8").splitlines()]
    made: Rows
    match kind:
        case "copies":  # the tutorial's set is two questions, many times
            made = [own[0], own[2]] * 100
        case "third":
            made = own[::3]
        case "bare":
            made = [
                row | {"messages": [turn for turn in row["messages"] if turn["role"] != "system"]}
                for row in own
            ]
    lines = (json.dumps(row, ensure_ascii=False) for row in made)
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return file


@dataclass(frozen=True)
class Task:
    """One row of the table: the `place`th of all."""

    place: int
    recipe: Recipe
    seed: int
    work: Path
    model: str
    more: tuple[str, ...]
    questions: int
    unseen: Path
    jobs: int
    gpus: int


def outcome(task: Task) -> str:
    """Train, ask; a row of the table."""
    every = sorted(os.sched_getaffinity(0))  # jobs that wait for one another's threads never end
    os.sched_setaffinity(0, every[task.place % task.jobs :: task.jobs] or every)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if task.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(task.place % task.gpus)
    from tunesmith.apps.cli import main

    recipe = task.recipe
    run = task.work / f"run-{recipe.name.replace(' ', '-')}-{task.seed}"
    command = ["train", "--model", task.model, "--data", str(rows_of(recipe.rows, task.work))]
    command += ["--out", str(run), "--seed", str(task.seed), "--probes", str(PROBES), "--json"]
    with contextlib.redirect_stdout(told := io.StringIO()):
        main([*command, *recipe.flags.split(), *task.more])
    events = [json.loads(line) for line in told.getvalue().splitlines()]
    steps = sum(event["event"] == "Step" for event in events)
    best = [event for event in events if event["event"] == "Evaluated" and event["best"]]
    cells = (
        recipe.name,
        f"{task.seed}",
        f"{best[-1]['step']} of {steps}" if best else f"{steps}",
        f"{best[-1]['kl']:.3f}" if best else "",
        *_asked(run, task),
    )
    return "| " + " | ".join(cells) + " |"


def _asked(run: Path, task: Task) -> Iterator[str]:
    """Of the package's questions and of the unseen ones: name said, leaked, ended."""
    from peft import PeftModel

    from tunesmith.data import identity, neutral
    from tunesmith.data.messages import Message
    from tunesmith.data.render import Renderer
    from tunesmith.models.adapter import read_info
    from tunesmith.models.store import locate
    from tunesmith.models.tokenizer import load_tokenizer
    from tunesmith.models.weights import load_model

    found = locate(task.model)
    tokenizer = load_tokenizer(found)
    renderer = Renderer(tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base: Any = load_model(found, dtype=torch.float32, device=device, attention="sdpa")
    info = read_info(run / "adapter")
    told = (info and info.system) or identity.default_system(NAME, "zh")

    def answered(questions: Sequence[str]) -> list[tuple[str, bool]]:
        """Each question with the system prompt, then without; and whether the answer ended."""
        prompts = [
            renderer.prompt([*before, Message("user", question)])
            for question in questions
            for before in ([Message("system", told)], [])
        ]
        answers: dict[int, tuple[str, bool]] = {}
        places = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        for start in range(0, len(places), AT_ONCE[device.type]):
            some = places[start : start + AT_ONCE[device.type]]
            rows = [prompts[place] for place in some]
            longest = max(map(len, rows))
            ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
            seen = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
            with torch.no_grad():
                got = model.generate(
                    input_ids=ids, attention_mask=torch.tensor(seen, device=device),
                    max_new_tokens=LONGEST, do_sample=False,
                    eos_token_id=list(renderer.stop_ids), pad_token_id=0,
                )  # fmt: skip
            for place, row in zip(some, got[:, longest:].tolist(), strict=True):
                end = next((at for at, token in enumerate(row) if token in renderer.stop_ids), None)
                answers[place] = tokenizer.decode(row[:end]), end is not None
        return [answers[place] for place in range(len(prompts))]

    unseen = json.loads(task.unseen.read_text("utf-8"))
    few = task.questions
    asked = (
        ([*identity.held_out(["zh"])[:few], *identity.held_out(["en"])[:few]],
         neutral.held_out(few)),
        ([*unseen["identity"]["zh"][:few], *unseen["identity"]["en"][:few]],
         [*unseen["neutral"]["zh"][:few], *unseen["neutral"]["en"][:few]]),
    )  # fmt: skip
    model = base
    before = [answered(what) for _, what in asked]
    tuned: Any = PeftModel.from_pretrained(base, str(run / "adapter"))
    model = tuned.merge_and_unload()
    for (who, what), then in zip(asked, before, strict=True):
        answers, unrelated = answered(who), answered(what)
        leaked = sum(
            any(name in now and name not in earlier for name in (NAME, AUTHOR))
            for (now, _), (earlier, _) in zip(unrelated, then, strict=True)
        )
        yield f"{sum(NAME in answer for answer, _ in answers)} of {len(answers)}"
        yield f"{leaked} of {len(unrelated)}"
        yield f"{sum(ended for _, ended in answers)} of {len(answers)}"


def main() -> None:
    arguments = sys.argv[1:]
    more = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--only", nargs="*", default=[], help="recipes by name")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    parser.add_argument("--questions", type=int, default=108, help="of each kind, at most")
    parser.add_argument(
        "--unseen", type=Path, default=Path(__file__).parent / "unseen.json",
        help="questions that nothing was written in sight of; unseen_names.json are others",
    )  # fmt: skip
    options = parser.parse_args(arguments[: len(arguments) - len(more) - bool(more)])
    if not options.unseen.is_file():
        parser.error(f"there is no {options.unseen}; name a file of questions, or none")
    options.work.mkdir(parents=True, exist_ok=True)
    print("| recipe | seed | best step | KL, nats a token | name said | leaked | ended "
          "| unseen: name said | leaked | ended |")  # fmt: skip
    print("| --- " * 10 + "|", flush=True)
    chosen = [recipe for recipe in RECIPES if not options.only or recipe.name in options.only]
    for recipe in chosen:
        rows_of(recipe.rows, options.work)
    cases = [(recipe, seed) for recipe in chosen for seed in options.seeds]
    tasks = [
        Task(
            place, recipe, seed, options.work, options.model, tuple(more), options.questions,
            options.unseen, options.jobs, torch.cuda.device_count(),
        )
        for place, (recipe, seed) in enumerate(cases)
    ]  # fmt: skip
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=fresh, max_tasks_per_child=1) as pool:
        for line in pool.map(outcome, tasks):
            print(line, flush=True)


if __name__ == "__main__":
    main()
