"""Replay: neutral questions with the base model's own answers, so that tuning forgets less.

What is trained there is the base's whole distribution over the next token, not the one it chose:
a model that has not moved has nothing to learn from replay, and one that has is drawn back. An
answer that says the identity to be taught would teach it in the wrong place and is left out.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith import paths
from tunesmith.data import neutral
from tunesmith.data.messages import Message
from tunesmith.data.packs import Distribution, Sample
from tunesmith.data.render import Renderer
from tunesmith.training.events import Replaying
from tunesmith.training.forward import ATTENTION, arithmetic
from tunesmith.training.prepare import Prepared

if TYPE_CHECKING:
    from peft import PeftModel

MAX_ANSWER = 24  # tokens: an answer goes astray in its beginning
LIKELIEST = 32  # tokens of a distribution that are kept
AT_ONCE = 64  # questions answered together


def make_replay(
    model: "PeftModel",
    renderer: Renderer,
    data: Prepared,
    count: int,
    file: Path,
    likeliest: int = LIKELIEST,
) -> Iterator[Replaying]:
    """Ask the untrained model `count` neutral questions and write its answers to `file`.

    The questions alternate between languages, so each pair meets the next system prompt of the
    data. Of each distribution the `likeliest` tokens are kept, their shares made to sum to 1.
    """
    prompts = [
        renderer.prompt(_messages(question, data.systems[index // 2 % len(data.systems)]))
        for index, question in enumerate(neutral.replay(count))
    ]
    answers: dict[int, Sample] = {}
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(prompts), AT_ONCE):
        chosen = by_length[start : start + AT_ONCE]
        asked = [prompts[index] for index in chosen]
        said = _answers(model, asked, renderer.stop_ids, likeliest)
        answers |= zip(chosen, said, strict=True)
        yield Replaying(len(answers), len(prompts))
    who = (data.identity.name, data.identity.author) if data.identity is not None else ()
    samples = (answers[index] for index in range(len(prompts)))
    write_replay(file, [sample for sample in samples if not _says(sample, who, renderer)])


def write_replay(file: Path, samples: Sequence[Sample]) -> None:
    """Keep the samples in a safetensors file, their soft targets included."""
    from safetensors.torch import save

    soft = [what for sample in samples for what in sample.soft]
    tensors = {
        "input_ids": torch.tensor([token for sample in samples for token in sample.input_ids]),
        "lengths": torch.tensor([len(sample.input_ids) for sample in samples]),
        "answers": torch.tensor([sample.trained_tokens for sample in samples]),
        "likeliest": torch.tensor([[token for token, _ in what] for what in soft]),
        "shares": torch.tensor([[share for _, share in what] for what in soft]),
    }
    paths.write_atomic(file, save(tensors))


def read_replay(file: Path) -> list[Sample]:
    """The samples that `write_replay` wrote."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    ids = iter(tensors["input_ids"].tolist())
    rows = zip(tensors["likeliest"].tolist(), tensors["shares"].tolist(), strict=True)
    sizes = zip(tensors["lengths"].tolist(), tensors["answers"].tolist(), strict=True)
    return [
        _sample(list(islice(ids, length)), [_pairs(*row) for row in islice(rows, answer)])
        for length, answer in sizes
    ]


def _answers(
    model: "PeftModel", prompts: Sequence[list[int]], stop_ids: frozenset[int], likeliest: int
) -> list[Sample]:
    """Greedy answers, with what the model might have said at each token instead."""
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
                output_logits=True,
                return_dict_in_generate=True,
            ),
        )
    base.set_attn_implementation(ATTENTION)
    soft = zip(*(_likeliest(logits, likeliest) for logits in output.logits), strict=True)
    said = (_until(row, stop_ids) for row in output.sequences[:, longest:].tolist())
    return [
        _sample([*prompt, *ids], list(whats[: len(ids)]))
        for prompt, ids, whats in zip(prompts, said, soft, strict=True)
    ]


def _likeliest(logits: torch.Tensor, count: int) -> list[Distribution]:
    """Of each row (B, vocab_size) the `count` likeliest tokens and their shares."""
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    top = logits.softmax(-1, dtype=exact).topk(min(count, logits.shape[-1]))
    shares = top.values / top.values.sum(-1, keepdim=True)
    return [_pairs(*row) for row in zip(top.indices.tolist(), shares.tolist(), strict=True)]


def _pairs(ids: list[int], shares: list[float]) -> Distribution:
    return tuple(zip(ids, shares, strict=True))


def _until(ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    """The ids up to the first that ends an answer; padding follows it."""
    end = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids) - 1)
    return ids[: end + 1]


def _sample(ids: list[int], soft: list[Distribution]) -> Sample:
    """The answer is the end of `ids`, as long as `soft`."""
    asked = len(ids) - len(soft)
    return Sample(tuple(ids), (False,) * asked + (True,) * len(soft), tuple(soft))


def _says(sample: Sample, names: Sequence[str], renderer: Renderer) -> bool:
    answer = renderer.tokenizer.decode(sample.input_ids[-sample.trained_tokens :])
    return any(name in answer for name in names)


def _messages(question: str, system: str | None) -> list[Message]:
    turns = [Message("user", question)]
    return turns if system is None else [Message("system", system), *turns]
