"""Another architecture to try a recipe on, where no other small chat model lies at hand.

    python benchmarks/other_architecture.py MODEL OUT [--sampling SECONDS] [--healing SECONDS]
        [--batch N]

A Llama's weights are put into Qwen3's architecture, which differs in that it normalises queries and
keys, so that the model no longer says what it said. Then all its weights are trained towards the
original's distribution over the next token, on texts the original wrote: answers to questions, and
questions that it made up. What comes of it answers about as the original does, by other means.
"""

import argparse
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tunesmith.data import neutral
from tunesmith.data.messages import Message
from tunesmith.data.render import Renderer
from tunesmith.models.store import locate
from tunesmith.models.tokenizer import load_tokenizer, tokenizer_folder
from tunesmith.models.weights import load_model

SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
SYSTEMS = (None, None, "You are an AI assistant. Your name is Ada.", "Answer briefly.",
           "你是一名AI小助手，你的名字是小石头。", "You are a helpful assistant.")  # fmt: skip
MADE_UP = 0.25  # share of questions that the model makes up
LENGTH = 192  # tokens sampled after each prompt
HELD_OUT = 64  # texts
TOGETHER = 32  # texts in a step
RATE, WARMUP = 4e-4, 30


def prompt(renderer: Renderer) -> list[int]:
    """A question behind a system prompt or none, or only what comes before a question."""
    system = random.choice(SYSTEMS)
    before = [Message("system", system)] if system else []
    if random.random() < MADE_UP:
        one, other = (renderer.prompt([*before, Message("user", it)]) for it in ("alpha", "beta"))
        part = next(place for place, pair in enumerate(zip(one, other, strict=False))
                    if pair[0] != pair[1])  # fmt: skip
        return one[:part]
    return renderer.prompt([*before, Message("user", random.choice(neutral.replay()))])


def written(model: Any, renderer: Renderer, seconds: float, batch: int) -> list[list[int]]:
    """What the model writes in so much time, its prompts included."""
    texts: list[list[int]] = []
    begun = time.perf_counter()
    while not texts or time.perf_counter() - begun < seconds:
        rows = [prompt(renderer) for _ in range(batch)]
        longest = max(map(len, rows))
        ids = [[0] * (longest - len(row)) + row for row in rows]
        seen = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        with torch.no_grad():
            got = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(seen, device=model.device),
                max_new_tokens=LENGTH, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                eos_token_id=model.config.vocab_size, pad_token_id=0,
            )  # fmt: skip
        texts += [row + new for row, new in zip(rows, got[:, longest:].tolist(), strict=True)]
    random.shuffle(texts)
    return texts


def apart(teacher: Any, student: Any, texts: Sequence[list[int]]) -> torch.Tensor:
    """KL(teacher ‖ student), nats a token."""
    longest = max(map(len, texts))
    device = teacher.device
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in texts], device=device)
    real = torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in texts])
    with torch.no_grad():
        wanted = teacher(ids).logits.float().log_softmax(-1)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = student(ids).logits
    got = logits.float().log_softmax(-1)
    real = real.to(device)
    distance: torch.Tensor = ((wanted.exp() * (wanted - got)).sum(-1) * real).sum() / real.sum()
    return distance


def scale_norms(student: Any, texts: Sequence[list[int]]) -> None:
    """Let each norm give what comes out the size that went in, layer by layer."""
    ids = torch.tensor([text[: min(map(len, texts))] for text in texts], device=student.device)
    for layer in student.model.layers:
        sizes: dict[Any, float] = {}

        def measure(norm: Any, given: Any, _: Any, sizes: dict[Any, float] = sizes) -> None:
            sizes[norm] = float(given[0].float().pow(2).mean().sqrt())

        norms = (layer.self_attn.q_norm, layer.self_attn.k_norm)
        hooks = [norm.register_forward_hook(measure) for norm in norms]
        with torch.no_grad():
            student(ids)
            for norm in norms:
                norm.weight.fill_(sizes[norm])
        for hook in hooks:
            hook.remove()


def heal(teacher: Any, student: Any, texts: list[list[int]], seconds: float) -> tuple[int, int]:
    """Train all weights for so much time; the steps done and the tokens seen."""
    student.requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    steps = tokens = at = 0
    begun = time.perf_counter()
    while (gone := (time.perf_counter() - begun) / seconds) < 1:
        if at + TOGETHER > len(texts):
            random.shuffle(texts)
            at = 0
        some = texts[at : at + TOGETHER]
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (steps + 1) / WARMUP) * max(0.02, 1 - gone)
        torch.autograd.backward(apart(teacher, student, some))
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps, tokens, at = steps + 1, tokens + sum(map(len, some)), at + TOGETHER
    return steps, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--sampling", type=float, default=90, help="seconds")
    parser.add_argument("--healing", type=float, default=110, help="seconds")
    parser.add_argument("--batch", type=int, default=768, help="texts written together")
    options = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = locate(options.model)
    teacher: Any = load_model(found, dtype=torch.bfloat16, device=device, attention="sdpa")
    teacher.eval().requires_grad_(False)
    config = Qwen3Config(**{name: getattr(teacher.config, name) for name in SAME})
    student: Any = Qwen3ForCausalLM(config)
    student.load_state_dict(
        {name: weight.float() for name, weight in teacher.state_dict().items()}, strict=False
    )
    student.to(device)
    texts = written(teacher, Renderer(load_tokenizer(found)), options.sampling, options.batch)
    held_out, texts = texts[:HELD_OUT], texts[HELD_OUT:]
    scale_norms(student, held_out[:8])
    with torch.no_grad():
        before = float(apart(teacher, student, held_out[:TOGETHER]))
    steps, tokens = heal(teacher, student, texts, options.healing)
    with torch.no_grad():
        after = float(apart(teacher, student, held_out[:TOGETHER]))
    print(f"{steps} steps, {tokens:,} tokens; on texts held out {before:.3f} nats a token from the "
          f"original before, {after:.3f} after")  # fmt: skip
    student.to(torch.bfloat16).save_pretrained(options.out)
    shutil.copytree(tokenizer_folder(found), options.out, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
