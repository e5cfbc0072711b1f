"""Rows to columns of samples, a chunk at a time: in this process, or in one for each core.

The processes import neither torch nor transformers. Each holds a tokenizer of its own.
"""

import json
import os
import pickle
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain
from queue import SimpleQueue
from subprocess import PIPE, Popen

import numpy as np

from tunesmith.data.chat_format import ChatTokenizer
from tunesmith.data.checks import examine_alone, question_key
from tunesmith.data.convert import as_row
from tunesmith.data.findings import Finding
from tunesmith.data.json_rows import Row
from tunesmith.data.messages import Conversation, Message, Place
from tunesmith.data.packs import Sample
from tunesmith.data.render import Renderer
from tunesmith.data.sources import parsed
from tunesmith.errors import TrainingError, TunesmithError
from tunesmith.language import current_language, language_of, set_language, t
from tunesmith.machine import cores
from tunesmith.training.samples import ROWS, SAMPLES, TEXT, TOKENS, TRAINED, Columns

MOST_PROCESSES = 16  # each takes about 100 MB; one reader does not feed more

Chunk = Sequence[Row | Finding]


@dataclass(frozen=True)
class Job:
    """What is the same for every row: `held_out` questions must not be asked."""

    tokenizer: ChatTokenizer
    max_length: int
    system: str | None
    held_out: Mapping[bytes, Place | None]


@dataclass(frozen=True)
class Rendered:
    """What a chunk became: its columns, or its errors, or why the template refused a row."""

    columns: Columns | None
    errors: tuple[Finding, ...] = ()
    refusal: TunesmithError | None = None


class Rendering:
    """Turns chunks into columns."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._renderer = Renderer(job.tokenizer)

    def render(self, chunk: Chunk, *, only_check: bool = False) -> Rendered:
        """The chunk's columns; none if a row has an error, or if it is only to be checked."""
        rows, errors = [], []
        for item in chunk:
            found = parsed(item)
            if isinstance(found, Finding):
                errors += [found] if found.is_error else []
            else:
                all_found = examine_alone(found.conversation, found.fields, self._job.held_out)
                errors += [finding for finding in all_found if finding.is_error]
                rows.append(found.conversation)
        if errors or only_check:
            return Rendered(None, tuple(errors))
        try:
            return Rendered(self._columns([self._with_system(row) for row in rows]))
        except TunesmithError as refusal:
            return Rendered(None, refusal=refusal)

    def _with_system(self, row: Conversation) -> Conversation:
        if self._job.system is None or row.system is not None:
            return row
        return replace(row, messages=(Message("system", self._job.system), *row.messages))

    def _whole(self, sample: Sample) -> bool:
        return len(sample.input_ids) < self._job.max_length

    def _columns(self, rows: Sequence[Conversation]) -> Columns:
        records = []
        lines: list[bytes] = []
        samples: list[Sample] = []
        for row in rows:
            kept, cut, dropped = _shortened(self._renderer.sample(row), self._job.max_length)
            line = json.dumps(as_row(row), ensure_ascii=False).encode("utf-8", "surrogatepass")
            records.append(
                (
                    int.from_bytes(question_key(row)[:8]),
                    _system_key(row.system),
                    _key(_last_answer(row)),
                    len(kept),
                    cut,
                    dropped,
                    cut + sum(not sample.trained[-1] for sample in kept if self._whole(sample)),
                    len(line),
                    row.identity is not None,
                    _is_chinese(row),
                )
            )
            lines.append(line)
            samples += kept
        ids = chain.from_iterable(sample.input_ids for sample in samples)
        trained = chain.from_iterable(sample.trained for sample in samples)
        tokens = np.fromiter(ids, TOKENS)
        tokens[np.fromiter(trained, np.bool_)] |= TRAINED
        sizes = [(len(sample.input_ids), sample.trained_tokens) for sample in samples]
        return Columns(
            rows=np.array(records, ROWS),
            samples=np.array(sizes, SAMPLES),
            tokens=tokens,
            text=np.frombuffer(b"".join(lines), TEXT),
        )


def in_processes(job: Job, chunks: Iterable[Chunk], is_broken: "Flag") -> Iterator[Rendered]:
    """The chunks rendered by a process for each core, in order; a few chunks are on their way.

    Once `is_broken` is set the chunks are only checked.

    Raises:
        TrainingError: A process died.
    """
    count = min(cores(), MOST_PROCESSES)
    waiting: deque[Future[Rendered]] = deque()
    with _Pool(job, count) as pool:
        for chunk in chunks:
            waiting.append(pool.submit(chunk, is_broken.is_set))
            if len(waiting) > 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass
class Flag:
    """Something that may be noticed on the way."""

    is_set: bool = False


class _Pool:
    """Processes that render, and a thread for each that speaks with it."""

    def __init__(self, job: Job, count: int) -> None:
        opening = pickle.dumps((job, current_language()))
        self._processes = [_Process(opening) for _ in range(count)]
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(count)

    def submit(self, chunk: Chunk, only_check: bool) -> "Future[Rendered]":
        return self._threads.submit(self._render, chunk, only_check)

    def _render(self, chunk: Chunk, only_check: bool) -> Rendered:
        process = self._idle.get()
        try:
            return process.render(chunk, only_check)
        finally:
            self._idle.put(process)

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.end()
        self._threads.shutdown()


class _Process:
    """Another Python that answers chunks; it ends when nobody can ask it any more.

    Not one of multiprocessing's: those begin by importing the caller's script.
    """

    def __init__(self, opening: bytes) -> None:
        code = f"from {__name__} import answer_chunks; answer_chunks()"
        command = [sys.executable, "-P", "-c", code]
        self._process = Popen(command, stdin=PIPE, stdout=PIPE)
        self._opening = opening

    def render(self, chunk: Chunk, only_check: bool) -> Rendered:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(self._opening + pickle.dumps((chunk, only_check)))
            self._process.stdin.flush()
            self._opening = b""
            found: Rendered = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise TrainingError(
                t("A process that prepared the data ended early (exit code {code}); the memory "
                  "may be full.", code=self._process.wait())
            ) from None  # fmt: skip
        return found

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # what was not sent any more
                    pipe.close()


def answer_chunks() -> None:
    """Render what standard input asks for until it ends, and answer on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not come between
    job, language = pickle.load(sys.stdin.buffer)
    set_language(language)
    rendering = Rendering(job)
    with suppress(EOFError, BrokenPipeError):
        while True:
            chunk, only_check = pickle.load(sys.stdin.buffer)
            pickle.dump(rendering.render(chunk, only_check=only_check), answers)
            answers.flush()


def _shortened(samples: Iterable[Sample], most: int) -> tuple[list[Sample], int, int]:
    """Samples, how many lost the end of an answer, and how many lost all of it."""
    kept, cut, dropped = [], 0, 0
    for sample in samples:
        short = Sample(sample.input_ids[:most], sample.trained[:most])
        if short.trained_tokens == 0:
            dropped += 1
        else:
            kept.append(short)
            cut += short.trained_tokens < sample.trained_tokens
    return kept, cut, dropped


def _system_key(system: str | None) -> int:
    """A hash that is 0 only for none."""
    return 0 if system is None else _key(system)


def _key(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _last_answer(row: Conversation) -> str:
    return next(turn.content for turn in reversed(row.messages) if turn.role == "assistant")


def _is_chinese(row: Conversation) -> bool:
    asked = next(message.content for message in row.messages if message.role == "user")
    return language_of(asked) == "zh"
