"""Conversations with a model: messages → ids → engine → text. Everything that talks comes by here.

Three layers, each usable alone: `Engine.generate` (ids), `Pipeline.complete` (messages to text),
`Chat` (a conversation that remembers).
"""

import json
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from tunesmith import runs
from tunesmith.data.messages import Message
from tunesmith.data.render import Renderer
from tunesmith.engines.base import Engine, Sampling, Stop, check_prompt
from tunesmith.engines.choose import EngineName, open_engine
from tunesmith.errors import ModelError, RunError, TunesmithError, UsageError
from tunesmith.language import t
from tunesmith.models.adapter import CONFIG, check_adapter, read_info
from tunesmith.models.store import LocalModel, locate
from tunesmith.models.tokenizer import ChatTokenizer, load_tokenizer
from tunesmith.paths import write_atomic

AT_ONCE = 8  # questions that `answers` has under way; llama.cpp decodes them together


@dataclass(frozen=True)
class Stats:
    """How an answer went. Times in seconds from the question; `tokens` without the end token."""

    prompt_tokens: int
    tokens: int
    first_token: float
    seconds: float
    finish: Literal["stop", "length", "cancelled"]

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token; 0 if there was no second one."""
        took = self.seconds - self.first_token
        return (self.tokens - 1) / took if self.tokens > 1 and took > 0 else 0.0


class Reply(Iterator[str]):
    """An answer while it is written: iterate for its pieces; `close()` stops it.

    Attributes:
        text: What has arrived so far.
        stats: Once it has ended: how it went.
    """

    def __init__(self, pipeline: "Pipeline", prompt: list[int], sampling: Sampling, adapter: bool):
        self.text = ""
        self.stats: Stats | None = None
        self._stop = Stop()
        self._pieces = self._run(pipeline, prompt, sampling, adapter)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop the engine's work on this answer; what has arrived stays."""
        self._pieces.close()

    def ticks(self, every: float) -> Generator[None, None, None]:
        """Let a thread write the answer; yield at least every `every` seconds until it has ended.

        Closing the generator stops the answer at once, also before its first token.

        Raises:
            EngineError: The engine died.
        """
        news, failed = threading.Event(), list[BaseException]()

        def write() -> None:
            try:
                for _ in self:
                    news.set()
            except TunesmithError as error:
                failed.append(error)
            finally:
                news.set()

        # In a copy of this context, for the language errors are told in.
        writer = threading.Thread(target=copy_context().run, args=(write,), daemon=True)
        writer.start()
        try:
            while writer.is_alive():
                news.wait(every)
                news.clear()
                yield
        finally:
            self._stop.ask()
            writer.join()
        for error in failed:
            raise error

    def _run(
        self, pipeline: "Pipeline", prompt: list[int], sampling: Sampling, adapter: bool
    ) -> Generator[str, None, None]:
        stop_ids = pipeline.renderer.stop_ids
        ids = pipeline.engine.generate(
            prompt, sampling, stop_ids=stop_ids, adapter=adapter, stop=self._stop
        )
        decoder = pipeline.tokenizer.stream()
        clock = _Clock(len(prompt))
        finish: Literal["stop", "length", "cancelled"] = "cancelled"
        try:
            while True:
                try:
                    id = next(ids)
                except StopIteration as end:
                    finish = "cancelled" if self._stop.asked else end.value
                    break
                clock.tick()
                yield from self._said(decoder.push(id))
            yield from self._said(decoder.finish())
        finally:
            ids.close()
            self.stats = clock.stats(finish)

    def _said(self, piece: str) -> Iterator[str]:
        self.text += piece
        if piece:
            yield piece


@dataclass(frozen=True)
class Pipeline:
    """A loaded model that answers messages. Keeps nothing; several threads may use it at once."""

    engine: Engine
    tokenizer: ChatTokenizer
    renderer: Renderer

    def complete(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        adapter: bool = True,
        tools: Sequence[dict[str, Any]] = (),
    ) -> Reply:
        """Begin the answer to `messages`.

        Raises:
            DataError: The chat template refuses these messages.
            EngineError: They do not fit the context, or, while iterating, the engine died.
        """
        prompt = self.renderer.prompt(messages, tools)
        check_prompt(len(prompt), self.engine.context_length)
        return Reply(self, prompt, sampling or Sampling(), adapter)

    def close(self) -> None:
        """Free the model."""
        self.engine.close()


@dataclass
class Chat:
    """A conversation. A turn is kept once it has ended, or as far as it got when it was stopped.

    Attributes:
        system: The system prompt, or None for the template's own.
        adapter_on: Whether the adapter, if there is one, takes part in the next answer.
        notices: What the user should know about the adapter, a sentence each.
        messages: The turns so far, the system prompt not among them.
        stats: How the last answer went.
    """

    pipeline: Pipeline
    model_name: str
    system: str | None = None
    adapter_on: bool = True
    notices: tuple[str, ...] = ()
    messages: list[Message] = field(default_factory=list)
    stats: Stats | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter to switch."""
        return self.pipeline.engine.has_adapter

    def ask(self, text: str, sampling: Sampling | None = None) -> Generator[str, None, None]:
        """Yield the answer in pieces of whole characters. Closing the generator stops it.

        Raises:
            EngineError: The conversation does not fit the context, or the engine died; the
                question is not kept.
        """
        question = Message("user", text)
        reply = self.pipeline.complete(
            [*with_system(self.system, self.messages), question], sampling, adapter=self.adapter_on
        )
        try:
            yield from reply
        except (GeneratorExit, KeyboardInterrupt):
            reply.close()
            if reply.text:
                self._keep(question, reply)
            raise
        self._keep(question, reply)

    def reset(self) -> None:
        """Forget the turns; the system prompt and the adapter stay as they are."""
        self.messages.clear()

    def save(self, path: Path) -> None:
        """Write the conversation as one line of JSON, which is also a training row.

        Raises:
            UsageError: The file is there already, or cannot be written.
        """
        if path.exists():
            raise UsageError(t("{path} is there already; choose another name.", path=path))
        turns = [message.as_dict() for message in with_system(self.system, self.messages)]
        try:
            write_atomic(path, json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UsageError(
                t("{path} cannot be written: {reason}.", path=path, reason=error.strerror)
            ) from error

    def close(self) -> None:
        """Free the model."""
        self.pipeline.close()

    def _keep(self, question: Message, reply: Reply) -> None:
        self.messages += [question, Message("assistant", reply.text)]
        self.stats = reply.stats


def open_pipeline(
    model: LocalModel,
    adapter: Path | None = None,
    *,
    engine: EngineName = "auto",
    device: str = "auto",
    all_cores: bool = False,
) -> Pipeline:
    """Load a model, with an adapter folder that passed `check_adapter` if one is given.

    The rest is as in `open_engine`.

    Raises:
        ModelError: The tokenizer or the chat template is not usable.
        EngineError: The engine did not start.
    """
    # First the engine, because llama.cpp loads in its own process while we read the tokenizer.
    started = open_engine(model, adapter, engine=engine, device=device, all_cores=all_cores)
    try:
        tokenizer = load_tokenizer(model)
        return Pipeline(started, tokenizer, Renderer(tokenizer))
    except BaseException:
        started.close()
        raise


def open_chat(
    target: str,
    *,
    adapter: str | None = None,
    system: str | None = None,
    engine: EngineName = "auto",
    device: str = "auto",
) -> Chat:
    """Open a conversation with a MODEL, or with a RUN: its base, its adapter, its system prompt.

    Args:
        target: MODEL or RUN.
        adapter: A RUN or an adapter folder to put on the model.
        system: A system prompt instead of the one the adapter was trained with.
        engine: What runs the model.
        device: Where, for the transformers engine.

    Raises:
        UsageError, RunError, ModelError, EngineError: What is wrong, and what to do.
    """
    if adapter is None and _is_adapter(target):
        target, adapter = _base_of(target), target
    model = locate(target)
    if adapter is None:
        pipeline = open_pipeline(model, engine=engine, device=device)
        return Chat(pipeline, model.name, system)
    folder = _adapter_folder(adapter)
    notices = check_adapter(folder, model)
    info = read_info(folder)
    if system is None and info is not None:
        system = info.system
    pipeline = open_pipeline(model, folder, engine=engine, device=device)
    return Chat(pipeline, f"{model.name} + {adapter}", system, notices=notices)


def answers(
    pipeline: Pipeline,
    conversations: Sequence[Sequence[Message]],
    sampling: Sampling,
    *,
    adapter: bool = True,
) -> Iterator[tuple[str, Stats]]:
    """Answer many conversations, several at once; yields in their order, each when it is ready.

    Raises:
        DataError, EngineError: As `Pipeline.complete`.
    """

    def answer(messages: Sequence[Message]) -> tuple[str, Stats]:
        reply = pipeline.complete(messages, sampling, adapter=adapter)
        text = "".join(reply)
        assert reply.stats is not None
        return text, reply.stats

    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = [pool.submit(answer, messages) for messages in conversations]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def with_system(system: str | None, messages: Sequence[Message]) -> list[Message]:
    """The messages behind a system prompt, if there is one."""
    return [*messages] if system is None else [Message("system", system), *messages]


def _is_adapter(target: str) -> bool:
    return runs.is_run(target) or (Path(target) / CONFIG).is_file()


def _adapter_folder(name: str) -> Path:
    if (Path(name) / CONFIG).is_file():
        return Path(name)
    run = runs.find(name)
    if not (run.adapter / CONFIG).is_file():
        raise RunError(
            t(
                "{run} has no adapter yet; finish it with: tunesmith train --resume {run}",
                run=run.path,
            )
        )
    return run.adapter


def _base_of(name: str) -> str:
    if runs.is_run(name):
        return runs.find(name).settings.model
    info = read_info(Path(name))
    if info is None:
        raise ModelError(
            t(
                "{path} does not say which model it belongs to; name the model first, and give "
                "this folder with --adapter.",
                path=name,
            )
        )
    return info.base_name


@dataclass
class _Clock:
    prompt_tokens: int
    tokens: int = 0
    first_token: float = 0.0
    start: float = field(default_factory=time.monotonic)

    def tick(self) -> None:
        self.tokens += 1
        if self.tokens == 1:
            self.first_token = time.monotonic() - self.start

    def stats(self, finish: Literal["stop", "length", "cancelled"]) -> Stats:
        seconds = time.monotonic() - self.start
        return Stats(self.prompt_tokens, self.tokens, self.first_token, seconds, finish)
