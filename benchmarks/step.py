"""Time optimizer steps of a model of Qwen2-7B's shape with random weights, on one GPU.

    python benchmarks/step.py [--layers 28]

`long`: 4 rows of 4096 tokens, all trained, one in a pass. `chat`: 64 rows of log-normal lengths
(median 240), half of each trained, 16 in a pass. Nothing is recomputed. Prints real tokens per
second, the median of five steps, and the peak of the GPU's memory.
"""

import argparse
import math
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from shapes import qwen2_7b
from tunesmith.config import TrainSettings
from tunesmith.data.packs import Sample, pack
from tunesmith.training.forward import (
    ATTENTION,
    arithmetic,
    pack_loss,
    prove_packing,
    register_attention,
)
from tunesmith.training.head import Head
from tunesmith.training.lora import add_lora, trainable

STEPS = 5
VOCABULARY = 150_000  # ids drawn for the rows


def make_model(layers: int) -> Any:
    """Random weights of Qwen2-7B's shape in bf16, with LoRA r=8 on all linear layers."""
    config = qwen2_7b(layers)
    register_attention()
    auto: Any = AutoModelForCausalLM
    with torch.device("cuda"):
        base = auto.from_config(config, dtype=torch.bfloat16, attn_implementation=ATTENTION)
    return add_lora(base, TrainSettings())


def long_rows(rng: random.Random) -> list[list[Sample]]:
    """Four passes of one row."""
    return [[_row(rng, 4096, asked=0)] for _ in range(4)]


def chat_rows(rng: random.Random) -> list[list[Sample]]:
    """Four passes of 16 rows, alike in sum."""
    drawn = (math.exp(math.log(240) + 0.7 * rng.gauss(0, 1)) for _ in range(64))
    sizes = sorted(min(2048, max(32, round(size))) for size in drawn)
    rows = [_row(rng, size, asked=size // 2) for size in sizes]
    return [rows[start::4] for start in range(4)]


def step_seconds(model: Any, head: Head | None, passes: Sequence[Sequence[Sample]]) -> float:
    """The median time of a step, after one that warms up."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-4)
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
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=28)
    options = parser.parse_args()
    rng = random.Random(0)
    model = make_model(options.layers)
    model.train()
    print(torch.cuda.get_device_name(), torch.__version__)
    for name, passes in (("long", long_rows(rng)), ("chat", chat_rows(rng))):
        head = prove_packing(model.get_base_model(), passes[0][:2])
        torch.cuda.reset_peak_memory_stats()
        seconds = step_seconds(model, head, passes)
        tokens = sum(len(sample.input_ids) for samples in passes for sample in samples)
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"{name}: {tokens / seconds:,.0f} tokens/s, {seconds:.3f} s, peak {peak:.1f} GB")


def _row(rng: random.Random, size: int, asked: int) -> Sample:
    ids = tuple(rng.randrange(VOCABULARY) for _ in range(size))
    return Sample(ids, (False,) * asked + (True,) * (size - asked))


if __name__ == "__main__":
    main()
