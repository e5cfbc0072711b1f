"""Replay: neutral questions with the base model's own answers, so that tuning forgets less.

What is trained there is the base's whole distribution over the next token, not the one it chose:
a model that has not moved has nothing to learn from replay, and one that has is drawn back. An
answer that says the identity to be taught would teach it in the wrong place and is left out.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith import paths
from tunesmith.data import neutral
from tunesmith.data.messages import Message
from tunesmith.data.packs import Sample, pack
from tunesmith.data.render import Renderer
from tunesmith.training.events import Replaying
from tunesmith.training.forward import ATTENTION, arithmetic, said_log_probabilities
from tunesmith.training.prepare import Prepared

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

MAX_ANSWER = 24  # tokens: answers go astray in their beginning
LIKELIEST = 32  # tokens of a distribution that are kept
AT_ONCE = 32  # questions answered together
PACKED = 8  # samples in a pack whose distributions are taken


def make_replay(
    model: "PeftModel", renderer: Renderer, data: Prepared, count: int, file: Path
) -> Iterator[Replaying]:
    """Ask the untrained model `count` neutral questions and write its answers to `file`.

    The questions alternate between languages, so each pair meets the next system prompt of the
    data.
    """
    prompts = [
        renderer.prompt(_messages(question, data.systems[index // 2 % len(data.systems)]))
        for index, question in enumerate(neutral.replay(count))
    ]
    answers: dict[int, list[int]] = {}
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(prompts), AT_ONCE):
        chosen = by_length[start : start + AT_ONCE]
        said = _greedy(model, [prompts[index] for index in chosen], renderer.stop_ids)
        answers |= zip(chosen, said, strict=True)
        yield Replaying(len(answers), len(prompts))
    who = (data.identity.name, data.identity.author) if data.identity is not None else ()
    lines = [
        json.dumps({"input_ids": [*prompt, *answers[index]], "answer": len(answers[index])})
        for index, prompt in enumerate(prompts)
        if not any(name in renderer.tokenizer.decode(answers[index]) for name in who)
    ]
    paths.write_atomic(file, "".join(line + "\n" for line in lines))


def _greedy(
    model: "PeftModel", prompts: Sequence[list[int]], stop_ids: frozenset[int]
) -> list[list[int]]:
    """Greedy answers with the token that ended them, if one did."""
    from transformers import GenerationConfig

    longest, pad = max(map(len, prompts)), 0
    padded = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    base = model.get_base_model()
    base.train(mode=False)
    base.set_attn_implementation("sdpa")
    with torch.no_grad(), arithmetic(base):
        output = base.generate(
            input_ids=torch.tensor(padded, device=base.device),
            attention_mask=torch.tensor(mask, device=base.device),
            generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                max_new_tokens=MAX_ANSWER,
                do_sample=False,
                eos_token_id=sorted(stop_ids),
                pad_token_id=pad,
            ),
        )
    base.set_attn_implementation(ATTENTION)
    return [_until(row, stop_ids) for row in output[:, longest:].tolist()]


def _until(ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    """The ids up to the first that ends an answer; padding follows it."""
    end = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids) - 1)
    return ids[: end + 1]


def read_replay(file: Path) -> list[Sample]:
    """The samples that `make_replay` wrote."""
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return [_sample(tuple(row["input_ids"]), row["answer"]) for row in rows]


def soften(
    model: "PreTrainedModel", samples: Sequence[Sample], likeliest: int = LIKELIEST
) -> list[Sample]:
    """The samples with the model's own distributions as targets; the model must be the base.

    Of each distribution the `likeliest` tokens are kept, and their shares made to sum to 1.
    """
    model.train(mode=False)
    with torch.no_grad(), arithmetic(model):
        groups = (samples[start : start + PACKED] for start in range(0, len(samples), PACKED))
        return [sample for group in groups for sample in _softened(model, group, likeliest)]


def _softened(model: "PreTrainedModel", samples: Sequence[Sample], count: int) -> Iterator[Sample]:
    # Not shared: so the rows come in the order of the samples.
    log_probabilities = said_log_probabilities(model, pack(samples, share=False))
    likeliest = log_probabilities.exp().topk(min(count, log_probabilities.shape[-1]))
    shares = likeliest.values / likeliest.values.sum(-1, keepdim=True)  # (rows, count)
    rows = zip(likeliest.indices.tolist(), shares.tolist(), strict=True)
    for sample in samples:
        own = islice(rows, sample.trained_tokens)
        soft = (tuple(zip(ids, weights, strict=True)) for ids, weights in own)
        yield replace(sample, soft=tuple(soft))


def _sample(ids: tuple[int, ...], answer: int) -> Sample:
    return Sample(ids, (False,) * (len(ids) - answer) + (True,) * answer)


def _messages(question: str, system: str | None) -> list[Message]:
    turns = [Message("user", question)]
    return turns if system is None else [Message("system", system), *turns]
