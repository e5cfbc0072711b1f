"""How others train the same rows: run by train.py, each in a process of its own.

    python benchmarks/peers.py NAME JOB.json

Every function below is what its project's documents say to write. Prints one JSON line: when each
step ended, its loss, and the peak of memory.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 8, 32
LEARNING_RATE = 1e-4
SEED = 42


@dataclass(frozen=True)
class Job:
    """What all of them train; `rows` are instruction/output rows in the order of the steps."""

    model: str
    rows: str
    system: str
    initial: str
    samples: int
    per_device: int
    steps: int
    max_length: int
    dtype: str
    dropout: float


def tutorial(job: Job, **more: Any) -> dict[str, Any]:
    """Trainer and PEFT as the tutorial writes them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

    auto: Any = AutoTokenizer
    tokenizer = auto.from_pretrained(job.model)
    causal: Any = AutoModelForCausalLM
    model = causal.from_pretrained(job.model, dtype=getattr(torch, job.dtype), device_map=_device())
    model.enable_input_require_grads()
    trainer = watched()(
        model=with_lora(model, job),
        args=arguments(job, **more),
        train_dataset=_rows(job, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True),
    )
    return seen(trainer)


def liger(job: Job) -> dict[str, Any]:
    """The tutorial's script with Liger's kernels."""
    import liger_kernel  # type: ignore[import-not-found,unused-ignore]  # noqa: F401

    return tutorial(job, use_liger_kernel=True)


def trl(job: Job) -> dict[str, Any]:
    """TRL's SFTTrainer on rows that are tokens already."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found,unused-ignore]

    auto: Any = AutoTokenizer
    tokenizer = auto.from_pretrained(job.model)
    causal: Any = AutoModelForCausalLM
    model = causal.from_pretrained(job.model, dtype=getattr(torch, job.dtype), device_map=_device())
    rows = [
        {
            "input_ids": row["input_ids"],
            "completion_mask": [int(label >= 0) for label in row["labels"]],
        }
        for row in _rows(job, tokenizer)
    ]
    trainer = watched(SFTTrainer)(
        model=with_lora(model, job),
        args=arguments(job, SFTConfig, max_length=job.max_length, completion_only_loss=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return seen(trainer)


def unsloth(job: Job) -> dict[str, Any]:
    """Unsloth's model and its checkpointing, under Trainer."""
    import torch
    from unsloth import FastLanguageModel  # type: ignore[import-not-found,unused-ignore]  # isort: skip
    from transformers import DataCollatorForSeq2Seq

    model, tokenizer = FastLanguageModel.from_pretrained(
        job.model,
        max_seq_length=job.max_length,
        dtype=getattr(torch, job.dtype),
        load_in_4bit=False,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=job.dropout,
        target_modules=list(TARGETS),
        use_gradient_checkpointing="unsloth",
        random_state=SEED,
    )
    trainer = watched()(
        model=_start(model, job),
        args=arguments(job, gradient_checkpointing=False),
        train_dataset=_rows(job, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True),
    )
    return seen(trainer)


PEERS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "tutorial": tutorial,
    "liger": liger,
    "trl": trl,
    "unsloth": unsloth,
}


def encode(row: dict[str, str], tokenizer: Any, system: str, max_length: int) -> dict[str, Any]:
    """A row as the tutorial encodes it, but that the turn ends with <|im_end|>, not with padding.

    Where padding is another token, as with Qwen2, losses could not be compared otherwise.
    """
    prompt = tokenizer(
        f"<|im_start|>system\n{system}<|im_end|>\n"
        f"<|im_start|>user\n{row['instruction']}<|im_end|>\n"
        "<|im_start|>assistant\n",
        add_special_tokens=False,
    )["input_ids"]
    answer = tokenizer(f"{row['output']}<|im_end|>", add_special_tokens=False)["input_ids"]
    ids, labels = prompt + answer, [-100] * len(prompt) + answer
    return {
        "input_ids": ids[:max_length],
        "attention_mask": [1] * len(ids[:max_length]),
        "labels": labels[:max_length],
    }


def _rows(job: Job, tokenizer: Any) -> list[dict[str, Any]]:
    rows = json.loads(Path(job.rows).read_text("utf-8"))
    return [encode(row, tokenizer, job.system, job.max_length) for row in rows]


def with_lora(model: Any, job: Job) -> Any:
    """LoRA through PEFT, on all linear layers of a layer."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        target_modules=list(TARGETS),
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=job.dropout,
    )
    return _start(get_peft_model(model, config), job)


def _start(model: Any, job: Job) -> Any:
    """The model with the adapter that all begin with, if there is one."""
    if not job.initial:
        return model
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(job.initial))
    return model


def arguments(job: Job, kind: Any = None, **more: Any) -> Any:
    """Trainer's arguments for a job, of a class like TrainingArguments."""
    from transformers import TrainingArguments

    given: dict[str, Any] = {
        "output_dir": str(Path(job.rows).with_name("trainer")),
        "per_device_train_batch_size": job.per_device,
        "gradient_accumulation_steps": job.samples // job.per_device,
        "max_steps": job.steps,
        "learning_rate": LEARNING_RATE,
        "gradient_checkpointing": True,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
    }
    chosen: Any = kind or TrainingArguments
    return chosen(**given | more)


def watched(kind: Any = None) -> Any:
    """A Trainer that notes the exact loss of each step and when it ended."""
    import torch
    from transformers import Trainer, TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc,unused-ignore]
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.losses: list[float] = []
            self.pieces: list[Any] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.losses.append(float(sum(self.pieces)))
            self.pieces.clear()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    base: Any = kind or Trainer

    class Watched(base):  # type: ignore[misc,unused-ignore]
        def __init__(self, **arguments: Any) -> None:
            self.watch = Watch()
            super().__init__(callbacks=[self.watch], **arguments)

        def training_step(self, *arguments: Any, **named: Any) -> Any:
            loss = super().training_step(*arguments, **named)
            self.watch.pieces.append(loss)
            return loss

    return Watched


def seen(trainer: Any) -> dict[str, Any]:
    """Train, and tell when each step ended, its loss, and the peak of memory."""
    import torch

    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    return {"ends": trainer.watch.ends, "losses": trainer.watch.losses, "peak": peak}


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    name, file = sys.argv[1:]
    job = Job(**json.loads(Path(file).read_text("utf-8")))
    try:
        seen = PEERS[name](job)
    except ImportError as error:
        seen = {"missing": str(error)}
    print("\n" + json.dumps(seen))


def write(job: Job, file: Path) -> None:
    """Write the job where `main` will read it."""
    file.write_text(json.dumps(asdict(job)), "utf-8")


if __name__ == "__main__":
    main()
