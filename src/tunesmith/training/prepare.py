"""From files to samples: read, split, render, cut. Nothing is lost without being counted.

Few rows are kept in memory. Many are rendered by all cores into a table in the cache, which is
found again as long as the files and what they are rendered with stay the same.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tunesmith
from tunesmith.config import TrainSettings
from tunesmith.data.checks import Errors, questions
from tunesmith.data.convert import chosen_questions
from tunesmith.data.findings import Finding
from tunesmith.data.json_rows import Row
from tunesmith.data.messages import Conversation, Identity
from tunesmith.data.sources import raw_rows, require_files
from tunesmith.errors import DataError, TrainingError
from tunesmith.language import t
from tunesmith.models.cache import keep_newest, made_once
from tunesmith.models.tokenizer import ChatTokenizer
from tunesmith.paths import cache_dir
from tunesmith.training.rendering import Chunk, Flag, Job, Rendered, Rendering, in_processes
from tunesmith.training.samples import (
    Columns,
    SampleStore,
    StoredRows,
    Table,
    file_hashes,
    write_table,
)

MIN_QUESTIONS_TO_SPLIT = 10
MOST_HELD_OUT = 2000  # rows; the mean loss of so many is known to about 0.01
MOST_SYSTEMS = 5000  # replay meets no more
CHUNK = 500  # rows
FEW = 6  # chunks are rendered here: other processes would take as long to begin
TABLES_KEPT = 6


@dataclass(frozen=True)
class Prepared:
    """Samples ready to train on, and what to tell of them.

    `cut` samples lost the end of an answer to the length limit, `dropped` lost all of it. The rows
    trained on ask so many different `questions`; `contradicted` of them another answers otherwise.
    In `endless` samples the end of the answer is not trained. `systems_in` has the system prompts
    of the rows that ask in zh, and in en.
    """

    train: SampleStore
    held_out: SampleStore
    held_out_rows: Sequence[Conversation]
    systems: tuple[str | None, ...]
    systems_in: Mapping[str, tuple[str | None, ...]]
    identity: Identity | None
    languages: tuple[str, ...]
    files: dict[str, str]
    cut: int
    dropped: int
    questions: int
    contradicted: int
    endless: int

    @property
    def system(self) -> str | None:
        """The system prompt most rows have; it is used wherever the run is talked to."""
        return next((system for system in self.systems if system is not None), None)

    @property
    def fingerprint(self) -> str:
        """SHA-256 that changes with every token and mask, and with their order."""
        return hashlib.sha256((self.train.sha256 + self.held_out.sha256).encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """What `data.json` keeps."""
        return {
            "files": self.files,
            "fingerprint": self.fingerprint,
            "samples": len(self.train),
            "held_out": len(self.held_out),
            "cut": self.cut,
            "dropped": self.dropped,
            "questions": self.questions,
            "contradicted": self.contradicted,
            "endless": self.endless,
            "system": self.system,
            "identity": self._identity_summary(),
        }

    def _identity_summary(self) -> dict[str, Any] | None:
        if self.identity is None:
            return None
        name, author = self.identity.name, self.identity.author
        return {"name": name, "author": author, "languages": list(self.languages)}


def prepare(settings: TrainSettings, tokenizer: ChatTokenizer) -> Prepared:
    """Read the files and turn every row into samples of at most `max_length` tokens.

    Raises:
        DataError: A row is broken; the message names it.
        TrainingError: There are no files, or nothing is left to train on.
    """
    if not settings.data:
        raise TrainingError(
            t("There is nothing to train on; name a file: --data FILE. `tunesmith data identity` "
              "writes a first one.")
        )  # fmt: skip
    files = [*settings.data, *settings.eval_data]
    require_files(files)
    with ThreadPoolExecutor(1) as thread:
        expected = thread.submit(_expected, files)  # takes about as long as the hashes
        hashes = dict(zip(files, file_hashes(files), strict=True))
    table = _table(
        settings.data, settings.eval_data, hashes, settings, tokenizer, expected.result()
    )
    trained = np.ones(len(table.rows), np.bool_)
    if settings.eval_data:
        other = _table(settings.eval_data, (), hashes, settings, tokenizer, {})
        held_out = np.ones(len(other.rows), np.bool_)
    else:
        other, held_out = table, _held_out(table, settings)
        trained &= ~held_out
    train = table.samples_of(trained)
    rows = table.rows[trained]
    dropped = int(rows["dropped"].sum())
    if not train:
        raise TrainingError(
            t("Nothing is left to train on: all {count} samples lose their answers to "
              "--max-length {length}; raise it.", count=dropped, length=settings.max_length)
        )  # fmt: skip
    own = np.flatnonzero(table.rows["identity"] & trained)
    return Prepared(
        train=train,
        held_out=other.samples_of(held_out),
        held_out_rows=StoredRows(other, np.flatnonzero(held_out)),
        systems=_systems(table, trained),
        systems_in={
            "zh": _systems(table, trained & table.rows["chinese"]),
            "en": _systems(table, trained & ~table.rows["chinese"]),
        },
        identity=table.conversation(int(own[0])).identity if len(own) else None,
        languages=_languages(table.rows["chinese"][own]),
        files={str(file): sha256 for file, sha256 in hashes.items()},
        cut=int(rows["cut"].sum()),
        dropped=dropped,
        questions=len(np.unique(rows["question"])),
        contradicted=_contradicted(rows),
        endless=int(rows["endless"].sum()),
    )


def _table(
    files: Sequence[Path],
    held_out: Sequence[Path],
    hashes: Mapping[Path, str],
    settings: TrainSettings,
    tokenizer: ChatTokenizer,
    opened: Mapping[Path, Table],
) -> Table:
    """All rows of the files; those of `held_out` must not be asked in them."""

    def job() -> Job:
        return Job(tokenizer, settings.max_length, settings.system, questions(held_out))

    every = [*files, *held_out]
    chunks = _chunks(raw_rows(files))
    first = list(islice(chunks, FEW))
    broken = Flag()
    if len(first) < FEW:
        rendering = Rendering(job())
        done = (rendering.render(chunk, only_check=broken.is_set) for chunk in first)
        return Table.of(_sound(done, broken, every))

    def make(folder: Path) -> None:
        done = in_processes(job(), chain(first, chunks), broken)
        write_table(folder, _sound(done, broken, every))
        for file, now in zip(every, file_hashes(every), strict=True):
            if now != hashes[file]:
                raise DataError(t("{path} was changed while it was read; start again.", path=file))

    sources = [[(file.suffix, hashes[file]) for file in some] for some in (files, held_out)]
    folder = _tables() / f"{_size(every)}-{_key(sources, settings, tokenizer)}"
    return _cached(folder, make, opened.get(folder))


def _expected(files: Sequence[Path]) -> dict[Path, Table]:
    """The table last used of those made of as many bytes, opened: most likely it is wanted."""
    try:
        folders = sorted(_tables().glob(f"{_size(files)}-*"), key=lambda one: one.stat().st_mtime)
    except OSError:  # another process clears up, or a file is gone: told where it is read
        return {}
    tables = {folder: Table.opened(folder) for folder in folders[-1:]}
    return {folder: table for folder, table in tables.items() if table is not None}


def _tables() -> Path:
    return cache_dir() / "samples"


def _size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _chunks(rows: Iterator[Row | Finding]) -> Iterator[Chunk]:
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def _sound(done: Iterable[Rendered], broken: Flag, files: Sequence[Path]) -> Iterator[Columns]:
    """The columns, if no row turns out to be broken.

    Raises:
        DataError: Rows have errors, or the template refuses one.
    """
    errors, refusal = Errors(), None
    for part in done:
        errors.add(part.errors)
        refusal = refusal or part.refusal
        broken.is_set = bool(errors) or refusal is not None
        if part.columns is not None:
            yield part.columns
    errors.require_none(files)
    if refusal is not None:
        raise refusal


def _cached(folder: Path, make: Callable[[Path], None], opened: Table | None) -> Table:
    table = opened or Table.opened(folder)
    if table is None:
        made_once(folder, make, is_whole=lambda made: Table.opened(made) is not None)
        keep_newest(folder.parent, TABLES_KEPT)
        table = Table.opened(folder)
    if table is None:
        raise TrainingError(
            t("{path} could not be read back; is its disk sound, and not full?", path=folder)
        )
    os.utime(folder)
    return table


def _key(sources: object, settings: TrainSettings, tokenizer: ChatTokenizer) -> str:
    """A hash of everything that the table follows from."""
    parts = (sources, settings.max_length, settings.system, tokenizer.sha256, _code())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@cache
def _code() -> str:
    """A hash of the code that reads and renders."""
    package = Path(tunesmith.__file__).parent
    digest = hashlib.sha256(repr([version(name) for name in ("tokenizers", "jinja2")]).encode())
    for part in ("data/*.py", "training/samples.py", "training/rendering.py"):
        for file in sorted(package.glob(part)):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _held_out(table: Table, settings: TrainSettings) -> NDArray[np.bool_]:
    """Which rows to hold out; where few different questions are asked, none."""
    asked = table.rows["question"]
    order = np.argsort(asked)
    starts = np.flatnonzero(np.diff(asked[order], prepend=~asked[order[:1]]))
    times = np.diff(starts, append=len(asked))
    if len(times) < MIN_QUESTIONS_TO_SPLIT:
        return np.zeros(len(asked), np.bool_)
    met = np.argsort(np.minimum.reduceat(order, starts))  # the questions as they are met
    chosen = chosen_questions(
        times[met].tolist(), settings.holdout, seed=settings.seed, most=MOST_HELD_OUT
    )
    is_chosen = np.zeros(len(times), np.bool_)
    is_chosen[met[chosen]] = True
    held_out = np.empty(len(asked), np.bool_)
    held_out[order] = np.repeat(is_chosen, times)
    return held_out


def _systems(table: Table, rows: NDArray[np.bool_]) -> tuple[str | None, ...]:
    """The system prompts of these rows, the most frequent first, then the earlier."""
    places = np.flatnonzero(rows)
    _, first, times = np.unique(table.rows["system"][places], return_index=True, return_counts=True)
    order = np.lexsort((first, -times))[:MOST_SYSTEMS]
    return tuple(table.conversation(int(row)).system for row in places[first[order]])


def _contradicted(rows: NDArray[Any]) -> int:
    """How many rows ask, behind the same system prompt, what another one answers otherwise."""
    asked, place = np.unique(rows[["question", "system"]], return_inverse=True)
    answers = np.unique(np.column_stack([place.astype(np.uint64), rows["answer"]]), axis=0)
    different = np.bincount(answers[:, 0].astype(np.intp), minlength=len(asked))
    return int((different[place] > 1).sum())


def _languages(chinese: NDArray[np.bool_]) -> tuple[str, ...]:
    """zh if a question has a Chinese character, en if one has none."""
    return (("zh",) if chinese.any() else ()) + (("en",) if not chinese.all() else ())
