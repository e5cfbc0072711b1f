"""Time optimizer steps of a model of Qwen2-7B's shape with random weights, on one GPU.

    python benchmarks/step.py [--layers 28] [--base-dtype nf4|fp8] [--no-compile]
        [--recompute N] [--recompute-mlps N]
    python benchmarks/step.py --peer tutorial|liger

`long`: 4 rows of 4096 tokens, all trained. `chat`: 64 rows of log-normal lengths (median 240), half
of each trained. A step is done in --passes passes (2). Prints real tokens per second, the median of
five steps, the peak of the GPU's memory, and what the first step took, compiling included. A peer
is Trainer and PEFT, four samples in a pass, checkpointing, dropout 0.1; two steps after the first.
"""

import argparse
import gc
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from peers import Job, arguments, seen, watched, with_lora
from shapes import qwen2_7b
from tunesmith.config import TrainSettings
from tunesmith.data.packs import Sample, pack
from tunesmith.models.nf4 import Nf4Linear
from tunesmith.training.compiled import compile_layers
from tunesmith.training.forward import (
    ATTENTION,
    arithmetic,
    pack_loss,
    prove_packing,
    register_attention,
)
from tunesmith.training.head import Head
from tunesmith.training.kernels.fuse import to_float8, use_kernels
from tunesmith.training.lora import add_lora, trainable
from tunesmith.training.memory import recompute_activations

STEPS = 5
VOCABULARY = 150_000  # ids drawn for the rows


def make_model(layers: int, *, nf4: bool) -> Any:
    """Random weights of Qwen2-7B's shape in bf16 or 4 bits, with LoRA r=8 on all linear layers."""
    config = qwen2_7b(layers)
    register_attention()
    auto: Any = AutoModelForCausalLM
    with torch.device("cuda"):
        base = auto.from_config(config, dtype=torch.bfloat16, attn_implementation=ATTENTION)
    for name, layer in list(base.model.named_modules()) if nf4 else ():
        if isinstance(layer, torch.nn.Linear):
            base.model.set_submodule(name, Nf4Linear.of(layer))
    return add_lora(base, TrainSettings())


def long_rows(rng: random.Random, passes: int) -> list[list[Sample]]:
    """Four rows of 4096 tokens."""
    rows = [_row(rng, 4096, asked=0) for _ in range(4)]
    return [rows[start::passes] for start in range(passes)]


def chat_rows(rng: random.Random, passes: int) -> list[list[Sample]]:
    """64 rows, the passes alike in sum."""
    drawn = (math.exp(math.log(240) + 0.7 * rng.gauss(0, 1)) for _ in range(64))
    sizes = sorted(min(2048, max(32, round(size))) for size in drawn)
    rows = [_row(rng, size, asked=size // 2) for size in sizes]
    return [rows[start::passes] for start in range(passes)]


def step_seconds(
    model: Any, head: Head | None, passes: Sequence[Sequence[Sample]]
) -> tuple[float, float]:
    """The time of the first step, and the median of those after it."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-4, fused=True)
    weight = sum(sample.trained_tokens for samples in passes for sample in samples)
    times = []
    for _ in range(1 + STEPS):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for samples in passes:
            with arithmetic(model.get_base_model()):
                loss = pack_loss(model, pack(samples), head) / weight
            torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return times[0], statistics.median(times[1:])


def peer_seconds(layers: int, samples: Sequence[Sample], *, liger: bool) -> tuple[float, float]:
    """The same of the tutorial's script, with Liger's kernels or without."""
    with torch.device("cuda"):
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(qwen2_7b(layers), dtype=torch.bfloat16)
    model.enable_input_require_grads()
    job = peer_job(len(samples), per_device=4, dropout=0.1)
    return trainer_seconds(with_lora(model, job), job, samples, use_liger_kernel=liger)


def peer_job(samples: int, *, per_device: int, dropout: float) -> Job:
    """Three steps, each of all the samples."""
    return Job(
        model="", rows="", system="", initial="", samples=samples, per_device=per_device,
        steps=3, max_length=4096, dtype="bfloat16", dropout=dropout,
    )  # fmt: skip


def trainer_seconds(
    model: Any, job: Job, samples: Sequence[Sample], **more: Any
) -> tuple[float, float]:
    """The same of Trainer, on a model with its adapter."""
    with TemporaryDirectory() as folder:
        trainer = watched()(
            model=model,
            args=arguments(replace(job, rows=f"{folder}/rows"), **more),
            train_dataset=[_labelled(sample) for sample in samples] * job.steps,
            data_collator=_padded,
        )
        begun = time.perf_counter()
        ends = [begun, *seen(trainer)["ends"]]
    times = [after - before for before, after in pairwise(ends)]
    return times[0], statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--base-dtype", choices=("auto", "nf4", "fp8"), default="auto")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--recompute", type=int, default=0, help="layers that recompute")
    parser.add_argument("--recompute-mlps", type=int, default=0, help="MLPs of others that do")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--peer", choices=("tutorial", "liger"))
    options = parser.parse_args()
    rng = random.Random(0)
    print(torch.cuda.get_device_name(), torch.__version__, vars(options))
    if options.peer:
        for name, rows in (("long", long_rows(rng, 1)[0]), ("chat", chat_rows(rng, 1)[0])):
            torch.cuda.reset_peak_memory_stats()
            random.Random(0).shuffle(rows)  # as they come, long beside short
            took = peer_seconds(options.layers, rows, liger=options.peer == "liger")
            report(name, [rows], *took)
        return
    model = make_model(options.layers, nf4=options.base_dtype == "nf4")
    use_kernels(model)
    model.train()
    gc.collect()
    torch.cuda.empty_cache()
    kinds = (("long", long_rows(rng, options.passes)), ("chat", chat_rows(rng, options.passes)))
    head = prove_packing(model.get_base_model(), kinds[1][1][0][:2])
    if options.base_dtype == "fp8":
        to_float8(model)
    recompute_activations(model, options.recompute, options.recompute_mlps)
    if options.compile:
        compile_layers(model)
    for name, passes in kinds:
        torch.cuda.reset_peak_memory_stats()
        report(name, passes, *step_seconds(model, head, passes))


def report(name: str, passes: Sequence[Sequence[Sample]], first: float, seconds: float) -> None:
    tokens = sum(len(sample.input_ids) for samples in passes for sample in samples)
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(
        f"{name}: {tokens / seconds:,.0f} tokens/s, {seconds:.3f} s, peak {peak:.1f} GB, "
        f"first step {first:.1f} s",
        flush=True,
    )


def _labelled(sample: Sample) -> dict[str, list[int]]:
    pairs = zip(sample.input_ids, sample.trained, strict=True)
    return {
        "input_ids": list(sample.input_ids),
        "labels": [token if trained else -100 for token, trained in pairs],
    }


def _padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    columns = {
        "input_ids": [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows],
        "labels": [row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows],
        "attention_mask": [
            [1] * len(row["labels"]) + [0] * (longest - len(row["labels"])) for row in rows
        ],
    }
    return {name: torch.tensor(column) for name, column in columns.items()}


def _row(rng: random.Random, size: int, asked: int) -> Sample:
    ids = tuple(rng.randrange(VOCABULARY) for _ in range(size))
    return Sample(ids, (False,) * asked + (True,) * (size - asked))


if __name__ == "__main__":
    main()
