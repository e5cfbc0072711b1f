"""Replay: neutral questions with the base model's own answers, so that tuning forgets less.

The answers are the base's greedy tokens, exactly; an answer that ran into the limit is not
taught to end there.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tunesmith import paths
from tunesmith.data import neutral
from tunesmith.data.messages import Conversation, Message
from tunesmith.data.packs import Sample
from tunesmith.data.render import Renderer
from tunesmith.engines.base import Engine, Sampling, collect
from tunesmith.training.events import Replaying

MAX_ANSWER = 40  # tokens: enough to hold the manner of an answer, few enough to be quick
AT_ONCE = 8


def make_replay(
    engine: Engine, renderer: Renderer, systems: Sequence[str | None], count: int, file: Path
) -> Iterator[Replaying]:
    """Ask `count` neutral questions and write the answers as samples to `file`.

    The questions alternate between languages, so each pair meets the next system prompt.

    Raises:
        EngineError: The engine died.
    """
    prompts = [
        renderer.prompt(_messages(question, systems[index // 2 % len(systems)]))
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
    lines = [
        json.dumps({"input_ids": sample.input_ids, "answer": sum(sample.trained)})
        for sample in (future.result() for future in asked)
    ]
    paths.write_atomic(file, "".join(line + "\n" for line in lines))


def read_replay(file: Path) -> list[Sample]:
    """The samples that `make_replay` wrote."""
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return [_sample(tuple(row["input_ids"]), row["answer"]) for row in rows]


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
