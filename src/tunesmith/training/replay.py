"""Replay: neutral questions with the base model's own answers, so that tuning forgets less.

What is trained there is the base's whole distribution over the next token, not the one it chose:
a model that has not moved has nothing to learn from replay, and one that has is drawn back. An
answer that says the identity to be taught would teach it in the wrong place and is left out.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith import paths
from tunesmith.data import neutral
from tunesmith.data.messages import Conversation, Message
from tunesmith.data.packs import Sample, pack
from tunesmith.data.render import Renderer
from tunesmith.engines.base import Engine, Sampling, collect
from tunesmith.training.events import Replaying
from tunesmith.training.forward import said_log_probabilities
from tunesmith.training.prepare import Prepared

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_ANSWER = 16  # tokens: answers go astray in their beginning
LIKELIEST = 32  # tokens of a distribution that are kept
AT_ONCE = 8


def make_replay(
    engine: Engine,
    renderer: Renderer,
    data: Prepared,
    count: int,
    file: Path,
) -> Iterator[Replaying]:
    """Ask `count` neutral questions and write the answers as samples to `file`.

    The questions alternate between languages, so each pair meets the next system prompt of the
    data.

    Raises:
        EngineError: The engine died.
    """
    prompts = [
        renderer.prompt(_messages(question, data.systems[index // 2 % len(data.systems)]))
        for index, question in enumerate(neutral.replay(count))
    ]
    end = _end_of_turn(renderer)
    greedy = Sampling(temperature=0.0, top_p=1.0, max_tokens=MAX_ANSWER)

    def answer(prompt: list[int]) -> Sample:
        tokens = engine.generate(prompt, greedy, stop_ids=renderer.stop_ids, adapter=False)
        said, finish = collect(tokens)
        if finish == "stop":
            said.append(end)
        return Sample((*prompt, *said), (False,) * len(prompt) + (True,) * len(said))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        asked = [pool.submit(answer, prompt) for prompt in prompts]
        for done, _ in enumerate(as_completed(asked), 1):
            yield Replaying(done, len(prompts))
    samples = [future.result() for future in asked]
    who = (data.identity.name, data.identity.author) if data.identity is not None else ()
    lines = [
        json.dumps({"input_ids": sample.input_ids, "answer": sum(sample.trained)})
        for sample in samples
        if not any(name in _answer(sample, renderer) for name in who)
    ]
    paths.write_atomic(file, "".join(line + "\n" for line in lines))


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
    with torch.no_grad():
        groups = (samples[start : start + AT_ONCE] for start in range(0, len(samples), AT_ONCE))
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


def _answer(sample: Sample, renderer: Renderer) -> str:
    said = zip(sample.input_ids, sample.trained, strict=True)
    return renderer.tokenizer.decode([token for token, trained in said if trained])


def _end_of_turn(renderer: Renderer) -> int:
    """The id that ends an answer, as the template writes it."""
    probe = Conversation((Message("user", "?"), Message("assistant", "!")))
    rendered = renderer.sample(probe)[-1]
    ids = zip(rendered.input_ids, rendered.trained, strict=True)
    return [token for token, trained in ids if trained][-1]


def _sample(ids: tuple[int, ...], answer: int) -> Sample:
    return Sample(ids, (False,) * (len(ids) - answer) + (True,) * answer)


def _messages(question: str, system: str | None) -> list[Message]:
    turns = [Message("user", question)]
    return turns if system is None else [Message("system", system), *turns]
