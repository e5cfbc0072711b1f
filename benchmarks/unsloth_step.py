"""Time optimizer steps as step.py does, of Unsloth's model and kernels under Trainer, on one GPU.

    python benchmarks/unsloth_step.py [--layers 28] [--no-checkpointing] [--long 4] [--chat 8]

`--long` and `--chat` are the samples in a pass; with 0 that kind is left out. In a file of its own,
as Unsloth has to be imported before transformers. Dropout 0; two steps after the first.
"""

from unsloth import FastLanguageModel  # type: ignore[import-not-found,unused-ignore]  # isort: skip

import argparse
import gc
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from peers import ALPHA, RANK, SEED, TARGETS
from plan import make_model
from step import chat_rows, long_rows, peer_job, report, trainer_seconds


def unsloth_model(layers: int, *, checkpointing: bool) -> Any:
    """Random weights of Qwen2-7B's shape, saved and loaded as Unsloth does, with LoRA r=8."""
    how = "unsloth" if checkpointing else False
    with TemporaryDirectory() as work:
        folder = Path(work, "model")
        make_model(folder, "7b", layers)
        gc.collect()
        torch.cuda.empty_cache()
        model, _ = FastLanguageModel.from_pretrained(
            str(folder),
            max_seq_length=4096,
            dtype=torch.bfloat16,
            load_in_4bit=False,
            use_gradient_checkpointing=how,
        )
    return FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        target_modules=list(TARGETS),
        use_gradient_checkpointing=how,
        random_state=SEED,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--long", type=int, default=4, help="samples in a pass")
    parser.add_argument("--chat", type=int, default=8, help="samples in a pass")
    options = parser.parse_args()
    rng = random.Random(0)
    kinds = (
        ("long", options.long, long_rows(rng, 1)[0]),
        ("chat", options.chat, chat_rows(rng, 1)[0]),
    )
    model = unsloth_model(options.layers, checkpointing=options.checkpointing)
    print(torch.cuda.get_device_name(), torch.__version__, vars(options))
    for name, per_device, rows in kinds:
        if not per_device:
            continue
        torch.cuda.reset_peak_memory_stats()
        random.Random(0).shuffle(rows)  # as they come, long beside short
        job = peer_job(len(rows), per_device=per_device, dropout=0.0)
        # Autocast, as Unsloth's own trainers set it for a model in bf16.
        took = trainer_seconds(model, job, rows, gradient_checkpointing=False, bf16=True)
        report(name, [rows], *took)


if __name__ == "__main__":
    main()
