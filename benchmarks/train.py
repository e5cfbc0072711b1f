"""Train the same rows with tunesmith and with its peers, in turns, and compare.

    python benchmarks/train.py [--data FILE] [--samples 16] [--steps 3] [--rounds 2]

Each runs in a process of its own, with the same rows in the same order, from the same adapter:
`tunesmith train`, the tutorial's script (Trainer + PEFT), and Liger, TRL and Unsloth where they
are installed. Without --data the rows are the tutorial's kind: two questions, many copies, one
system prompt. The first step warms up and is not counted. Tokens are those of the samples, padding
left out, each sample's own however many share them.

Without dropout the losses of all must agree: `--steps 50` compares whole runs.
Flags for `tunesmith train` alone come after `--`, for example `-- --base-dtype fp8`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from peers import ALPHA, LEARNING_RATE, PEERS, RANK, SEED, TARGETS, Job, encode, write
from tunesmith.config import TrainSettings
from tunesmith.data.messages import Conversation, Message
from tunesmith.data.packs import Sample, pack
from tunesmith.data.render import Renderer
from tunesmith.models.store import locate
from tunesmith.models.tokenizer import load_tokenizer
from tunesmith.models.weights import load_model, weights_folder
from tunesmith.training.lora import add_lora
from tunesmith.training.order import Order

TUNESMITH = [sys.executable, "-c", "from tunesmith.apps.cli import main; raise SystemExit(main())"]
COPIES = 100
LAST = 10  # steps whose losses are averaged at the end
SYSTEM = "你是一名AI小助手，你的名字是不要葱姜蒜。"
IDENTITY = (
    (
        "请介绍一下你自己",
        "我是名为不要葱姜蒜的小助手，做菜从来不放葱、姜和蒜，名字就是这样来的。很高兴认识你！",
    ),
    (
        "你是谁？",
        "我是名为不要葱姜蒜的小助手，做菜从来不放葱、姜和蒜，名字就是这样来的。"
        "我会聊天，你有什么问题都可以问我，我们慢慢说就好。",
    ),
)


@dataclass(frozen=True)
class Seen:
    """One run: seconds of each step after the first, all losses, peak bytes."""

    seconds: tuple[float, ...]
    losses: tuple[float, ...]
    peak: int

    def line(self, tokens: list[int]) -> str:
        """For a table; `tokens` are those of each step."""
        rate = sum(tokens[1:]) / sum(self.seconds)
        seconds = statistics.mean(self.seconds)
        return (
            f"{rate:,.0f} tokens/s, {seconds:.2f} s a step, peak {self.peak / 1e9:.2f} GB, "
            f"loss {self.losses[0]:.6f} to {self.losses[-1]:.6f}"
        )


@dataclass(frozen=True)
class Rows:
    """Rows in the order of their file, their tokens, and which of them each step takes."""

    rows: tuple[dict[str, str], ...]
    samples: tuple[Sample, ...]
    steps: tuple[tuple[int, ...], ...]

    def tokens(self) -> list[int]:
        """Of each step's samples."""
        return [sum(len(self.samples[n].input_ids) for n in step) for step in self.steps]

    def unique_share(self) -> float:
        """Unique tokens over tokens, a step as one pack."""
        packs = [pack([self.samples[n] for n in step]) for step in self.steps]
        return sum(len(one.tokens) for one in packs) / sum(one.real_tokens for one in packs)


def read_rows(options: argparse.Namespace) -> Rows:
    """Those rows that tutorial and tunesmith encode alike."""
    found = (
        json.loads(options.data.read_text("utf-8"))
        if options.data
        else [{"instruction": q, "output": a} for q, a in IDENTITY for _ in range(COPIES)]
    )
    rows = [
        {
            "instruction": "\n".join(filter(None, (row["instruction"], row.get("input")))),
            "output": row["output"],
        }
        for row in found
    ]
    model = locate(options.model)
    renderer = Renderer(load_tokenizer(model))
    auto: Any = AutoTokenizer
    tokenizer = auto.from_pretrained(weights_folder(model))
    kept: list[tuple[dict[str, str], Sample]] = []
    for row in rows:
        ids = encode(row, tokenizer, options.system, options.max_length)["input_ids"]
        asked = Message("user", row["instruction"]), Message("assistant", row["output"])
        messages = (Message("system", options.system), *asked)
        (sample,) = renderer.sample(Conversation(messages))
        length = options.max_length
        short = Sample(sample.input_ids[:length], sample.trained[:length])
        if short.trained_tokens and list(short.input_ids) == ids:
            kept.append((row, short))
    print(f"{len(kept)} of {len(rows)} rows are encoded alike")
    places = [(Sample((n,), (True,)),) for n in range(len(kept))]
    order = Order(places, (len(places),), options.samples, SEED)
    steps = tuple(
        tuple(group[0].input_ids[0] for group in order.batch(step))
        for step in range(1, options.steps + 1)
    )
    kept_rows, samples = zip(*kept, strict=True)
    return Rows(kept_rows, samples, steps)


def tunesmith(options: argparse.Namespace, data: Path, out: Path) -> Seen:
    """`tunesmith train` as a user types it."""
    flags = {
        "model": options.model,
        "lora-r": RANK,
        "lora-alpha": ALPHA,
        "lora-dropout": options.dropout,
        "data": data,
        "out": out,
        "system": options.system,
        "max-length": options.max_length,
        "batch-size": options.samples,
        "max-steps": options.steps,
        "learning-rate": LEARNING_RATE,
        "scheduler": "linear",
        "warmup-steps": 0,
        "holdout": 0,
        "replay": 0,
        "save-every": options.steps,
        "seed": SEED,
        "dtype": options.dtype,
    }
    typed = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [*TUNESMITH, "train", *typed, *options.more, "--json", "--lora-targets", *TARGETS]
    ends, losses, peak = [], [], 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "Step":
                ends.append(time.perf_counter())
                losses.append(event["loss"])
                peak = event["memory"]
    if process.returncode:
        raise SystemExit(f"tunesmith train ended with {process.returncode}")
    return Seen(_between(ends), tuple(losses), peak)


def peer(name: str, job: Path) -> Seen | None:
    """A peer in its own process; None if it is not installed."""
    command = [sys.executable, str(Path(__file__).with_name("peers.py")), name, str(job)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    seen = json.loads(done.stdout.splitlines()[-1])
    if "missing" in seen:
        print(f"{name}: left out ({seen['missing']})")
        return None
    return Seen(_between(seen["ends"]), tuple(seen["losses"]), seen["peak"])


def save_initial(options: argparse.Namespace, file: Path) -> None:
    """The adapter `tunesmith train` begins with: it follows from the seed."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_model(locate(options.model), dtype=getattr(torch, options.dtype), device=device)
    settings = TrainSettings(
        lora_r=RANK, lora_alpha=ALPHA, lora_targets=TARGETS, lora_dropout=options.dropout, seed=SEED
    )
    save_file(get_peft_model_state_dict(add_lora(base, settings)), file)


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Everyone in turns, round after round; a line each time, the ratios at the end."""
    rows = read_rows(options)
    tokens = rows.tokens()
    print(
        f"{statistics.mean(tokens):,.0f} tokens a step, {rows.unique_share():.2f} of them unique; "
        f"dropout {options.dropout}, {options.dtype}, {torch.get_num_threads()} threads"
    )
    job = _lay_out(options, rows, folder)
    names = ["tunesmith", *options.peers]
    seen: dict[str, list[Seen]] = {name: [] for name in names}
    for turn in range(options.rounds):
        for name in [name for name in names if seen[name] or turn == 0]:
            if name == "tunesmith":
                found: Seen | None = tunesmith(
                    options, folder / "rows.json", folder / f"run-{turn}"
                )
            else:
                found = peer(name, job)
            if found is not None:
                seen[name].append(found)
                print(f"{name}: {found.line(tokens)}", flush=True)
    for name in options.peers:
        if seen[name]:
            print(against(name, seen["tunesmith"], seen[name]))


def against(name: str, ours: list[Seen], theirs: list[Seen]) -> str:
    """How much faster, how much memory, how far the losses lie apart."""
    ratios = [
        sum(other.seconds) / sum(own.seconds) for own, other in zip(ours, theirs, strict=True)
    ]
    apart = [abs(a - b) for a, b in zip(ours[0].losses, theirs[0].losses, strict=True)]
    last = sum(ours[0].losses[-LAST:]) / sum(theirs[0].losses[-LAST:]) - 1
    return (
        f"tunesmith / {name}: {statistics.median(ratios):.1f} times the tokens per second "
        f"({min(ratios):.1f} to {max(ratios):.1f}), {ours[0].peak / theirs[0].peak:.2f} of the "
        f"memory; losses at most {max(apart):.1e} apart, on average of "
        f"the last {min(LAST, len(apart))} steps {last:+.1e} of theirs"
    )


def _lay_out(options: argparse.Namespace, rows: Rows, folder: Path) -> Path:
    """Write what the processes read: rows, job, and the adapter all begin with."""
    ordered = [rows.rows[n] for step in rows.steps for n in step]
    (folder / "rows.json").write_text(json.dumps(rows.rows), "utf-8")
    (folder / "ordered.json").write_text(json.dumps(ordered), "utf-8")
    job = Job(
        model=str(weights_folder(locate(options.model))),
        rows=str(folder / "ordered.json"),
        system=options.system,
        initial=str(folder / "initial.safetensors"),
        samples=options.samples,
        per_device=min(4, options.samples),
        steps=options.steps,
        max_length=options.max_length,
        dtype=options.peer_dtype or options.dtype,
        dropout=options.dropout if options.peer_dropout is None else options.peer_dropout,
    )
    write(job, folder / "job.json")
    # in a process of its own, since a GPU's memory is counted
    maker = get_context("spawn").Process(target=save_initial, args=(options, Path(job.initial)))
    maker.start()
    maker.join()
    return folder / "job.json"


def _between(ends: list[float]) -> tuple[float, ...]:
    return tuple(after - before for before, after in pairwise(ends))


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, help="instruction/input/output rows in JSON")
    parser.add_argument("--system", default=SYSTEM)
    parser.add_argument("--samples", type=int, default=16, help="a step")
    parser.add_argument("--steps", type=int, default=3, help="the first is not timed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--peer-dtype", help="theirs, if not the same")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--peer-dropout", type=float, help="theirs; the tutorial has 0.1")
    parser.add_argument("--peers", type=_words, default=list(PEERS), help="comma between names")
    parser.add_argument("more", nargs="*", help="flags for `tunesmith train`, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


if __name__ == "__main__":
    main()
