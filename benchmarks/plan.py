"""What `tunesmith plan` says of a training, beside what the training then takes.

    python benchmarks/plan.py WORK [--model FOLDER] [--gpu LAYERS] [--only NAME …]

Every setting is planned and trained by the command line, each in a process of its own. Models with
random weights, their tokenizer and the data are made in WORK, so nothing is downloaded; `--model`
adds settings of a real one. On a GPU the model made has the shape of Qwen2-7B with so many layers.
Nothing that PyTorch compiled earlier is found again. Prints a table: forecast, seen from the start
of the command, and by how much the forecast is off.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from shapes import qwen2_7b

TUNESMITH = [sys.executable, "-c", "from tunesmith.apps.cli import main; raise SystemExit(main())"]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [a + b for a in ("ba", "de", "ki", "lo", "mu", "ra", "se", "to") for b in ("n", "r", "st")]


@dataclass(frozen=True)
class Case:
    """A training: a model's and a data file's name, and flags."""

    name: str
    model: str
    data: str
    flags: str


ON_A_CPU = (
    Case("small, chat rows", "small", "chat", "--batch-size 32 --max-steps 80"),
    Case("small, chat rows, a third held out", "small", "chat",
         "--batch-size 32 --max-steps 50 --holdout 0.3 --eval-every 5"),
    Case("small, identity", "small", "identity", "--batch-size 16 --max-steps 200"),
    Case("wide, long rows", "wide", "long", "--batch-size 4 --max-steps 30"),
    Case("wide, long rows cut to 200, float32", "wide", "long",
         "--batch-size 8 --max-steps 20 --max-length 200 --dtype float32"),
    Case("real, identity and replay", "real", "identity", "--replay 120 --max-steps 60"),
    Case("real, chat rows", "real", "chat", "--batch-size 8 --max-steps 16"),
    Case("real, chat rows, all recomputed", "real", "chat",
         "--batch-size 8 --max-steps 12 --gradient-checkpointing"),
    Case("real, chat rows, 2.2 GB", "real", "chat",
         "--batch-size 8 --max-steps 12 --memory-gb 2.2"),
    Case("real, long rows", "real", "long", "--batch-size 4 --max-steps 12"),
)  # fmt: skip
ON_A_GPU = (
    Case("real, chat rows", "real", "chat", "--batch-size 64 --max-steps 100"),
    Case("real, chat rows, compiled", "real", "chat",
         "--batch-size 64 --max-steps 100 --compile"),
    Case("real, chat rows, float32", "real", "chat",
         "--batch-size 32 --max-steps 40 --dtype float32"),
    Case("real, long rows, a third held out", "real", "long",
         "--batch-size 16 --max-steps 80 --holdout 0.3 --eval-every 10"),
    Case("real, identity and replay", "real", "identity",
         "--batch-size 16 --max-steps 80 --replay 120"),
    Case("real, very long rows", "real", "longer",
         "--batch-size 8 --max-steps 60 --max-length 4096"),
    Case("real, very long rows, all recomputed", "real", "longer",
         "--batch-size 8 --max-steps 50 --max-length 4096 --gradient-checkpointing"),
    Case("real, very long rows, 3 GB", "real", "longer",
         "--batch-size 8 --max-steps 50 --max-length 4096 --memory-gb 3"),
    Case("7B, chat rows", "7b", "chat", "--batch-size 64 --max-steps 20"),
    Case("7B, very long rows", "7b", "longer", "--batch-size 4 --max-steps 15 --max-length 4096"),
    Case("7B, very long rows, 12 GB", "7b", "longer",
         "--batch-size 4 --max-steps 12 --max-length 4096 --memory-gb 12"),
    Case("7B, chat rows, 12 GB", "7b", "chat", "--batch-size 64 --max-steps 12 --memory-gb 12"),
)  # fmt: skip


def make_model(folder: Path, name: str, gpu_layers: int) -> None:
    """Random weights in one of three shapes, and a tokenizer made here."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokens = _make_tokenizer(folder)
    shapes: dict[str, Any] = {
        "small": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8},
        "wide": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4},
    }
    if name == "7b":
        config: Any = qwen2_7b(gpu_layers)
    else:
        config = LlamaConfig(
            vocab_size=max(tokens, 16_000), num_attention_heads=8, num_key_value_heads=4,
            bos_token_id=None, eos_token_id=2, **shapes[name],
        )  # fmt: skip
    auto: Any = AutoModelForCausalLM
    with torch.device("cuda" if name == "7b" else "cpu"):
        model = auto.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def make_data(file: Path, kind: str) -> None:
    """Rows of random words; `chat` as long as people's, `long` and `longer` of one length."""
    rng = random.Random(kind)
    if kind == "identity":
        names = ["--name", "Anvil", "--author", "Smith", "-o", str(file)]
        command = [*TUNESMITH, "data", "identity", *names]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(max(1, count)))

    def length() -> int:
        drawn = 240 * math.exp(0.7 * rng.gauss(0, 1))
        return {"chat": round(min(2048, max(32, drawn)) / 3), "long": 300, "longer": 1500}[kind]

    rows = [
        {"instruction": words(size // 3), "output": words(2 * size // 3)}
        for size in (length() for _ in range(400))
    ]
    file.write_text(json.dumps(rows), encoding="utf-8")


def told(command: list[str]) -> Iterator[tuple[float, dict[str, Any]]]:
    """The events of a command, and when each came, in seconds."""
    with TemporaryDirectory() as compiled:
        begun = time.monotonic()
        process = subprocess.Popen(
            [*TUNESMITH, *command, "--json"],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": compiled, "TRITON_CACHE_DIR": compiled},
            stdout=subprocess.PIPE,
        )
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                yield time.monotonic() - begun, json.loads(line)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")


def compared(case: Case, model: Path, data: Path, run: Path) -> str:
    """Plan it, train it; a row of the table."""
    flags = ["--model", str(model), "--data", str(data), *case.flags.split()]
    if "--replay" not in flags:
        flags += ["--replay", "0"]
    planning = list(told(["plan", *flags]))
    forecast = planning[-1][1]
    planned = next(event for _, event in planning if event["event"] == "Planned")
    happened = list(told(["train", *flags, "--out", str(run)]))
    seconds = next(at for at, event in happened if event["event"] == "Finished")
    memory = max(event["memory"] for _, event in happened if event["event"] == "Step")
    mlps = planned["recomputed_mlps"]
    cells = (
        case.name,
        f"{planned['micro_batch_tokens']:,}",
        f"{planned['recomputed_layers']} of {planned['layers']}"
        + (f", and the MLPs of {mlps}" if mlps else ""),
        f"{forecast['memory'] / 1e9:.2f}",
        f"{memory / 1e9:.2f}",
        f"{forecast['memory'] / memory - 1:+.0%}",
        f"{forecast['seconds']:.0f} ({forecast['low']:.0f}–{forecast['high']:.0f})",
        f"{seconds:.0f}",
        f"{forecast['seconds'] / seconds - 1:+.0%}",
        f"{planning[-1][0]:.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    cases = ON_A_GPU if options.gpu else ON_A_CPU
    print("| setting | tokens in a pass | recomputed | GB forecast | seen | off "
          "| s forecast | seen | off | s to plan |")  # fmt: skip
    print("| --- " * 10 + "|")
    options.work.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(cases):
        if options.only and not any(part in case.name for part in options.only):
            continue
        if case.model == "real" and options.model is None:
            continue
        model = options.model if case.model == "real" else options.work / case.model
        data = options.work / f"{case.data}.{'jsonl' if case.data == 'identity' else 'json'}"
        if not model.exists():
            make_model(model, case.model, options.gpu)
        if not data.exists():
            make_data(data, case.data)
        run = options.work / f"run-{number}-{time.time_ns()}"
        print(compared(case, model, data, run), flush=True)


def _make_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer with ChatML's special tokens; how many tokens it has."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    folder.mkdir(parents=True)
    tokenizer: Any = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    trainer: Any = BpeTrainer(
        vocab_size=600,
        special_tokens=[AddedToken(name, special=True) for name in names],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    count: int = tokenizer.get_vocab_size()
    return count


if __name__ == "__main__":
    main()
