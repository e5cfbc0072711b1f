"""Rows to columns of samples, a chunk at a time: in this process, or in one for each core.

The processes import neither torch nor transformers. Each holds a tokenizer of its own.
"""

import json
import os
import pickle
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain
from multiprocessing import get_context, parent_process
from threading import Thread

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
from tunesmith.language import current_language, set_language, t
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
                    len(kept),
                    cut,
                    dropped,
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
    try:
        with _pool(job, count) as pool:
            for chunk in chunks:
                waiting.append(pool.submit(_render, chunk, is_broken.is_set))
                if len(waiting) > 2 * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool:
        raise TrainingError(
            t("A process that prepared the data ended early; the memory may be full. A script "
              'that trains must do so under `if __name__ == "__main__":`.')
        ) from None  # fmt: skip


@dataclass
class Flag:
    """Something that may be noticed on the way."""

    is_set: bool = False


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _pool(job: Job, count: int) -> Iterator[ProcessPoolExecutor]:
    # spawn: a fork would copy the locks of torch's and the tokenizer's threads
    pool = ProcessPoolExecutor(
        count, get_context("spawn"), _begin, (pickle.dumps(job), current_language())
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


_rendering: Rendering


def _begin(job: bytes, language: str) -> None:
    global _rendering  # noqa: PLW0603  # the one thing this process is there for
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    Thread(target=_end_with_parent, daemon=True).start()
    set_language(language)
    _rendering = Rendering(pickle.loads(job))


def _end_with_parent() -> None:
    """A parent that is killed cannot say that it is gone."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _render(chunk: Chunk, only_check: bool) -> Rendered:
    return _rendering.render(chunk, only_check=only_check)


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
    if system is None:
        return 0
    return int.from_bytes(blake2b(system.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _is_chinese(row: Conversation) -> bool:
    """Whether the question has a Chinese character."""
    asked = next(message.content for message in row.messages if message.role == "user")
    return any("\u4e00" <= letter <= "\u9fff" for letter in asked)
