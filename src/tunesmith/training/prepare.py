"""From files to samples: read, split, render, cut. Nothing is lost without being counted."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.config import TrainSettings
from tunesmith.data.checks import load, question_key
from tunesmith.data.convert import split
from tunesmith.data.messages import Conversation, Identity, Message
from tunesmith.data.packs import Sample
from tunesmith.data.render import Renderer
from tunesmith.errors import TrainingError
from tunesmith.language import t

MIN_QUESTIONS_TO_SPLIT = 10


@dataclass(frozen=True)
class Prepared:
    """Samples ready to train on, and what to tell of them."""

    train: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    held_out_rows: tuple[Conversation, ...]
    systems: tuple[str | None, ...]
    identity: Identity | None
    languages: tuple[str, ...]
    files: dict[str, str]
    cut: int
    dropped: int

    @property
    def system(self) -> str | None:
        """The system prompt most rows have; it is used wherever the run is talked to."""
        return next((system for system in self.systems if system is not None), None)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every token and mask, in order."""
        digest = hashlib.sha256()
        for sample in (*self.train, *self.held_out):
            digest.update(repr((sample.input_ids, sample.trained)).encode())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """What `data.json` keeps."""
        return {
            "files": self.files,
            "fingerprint": self.fingerprint,
            "samples": len(self.train),
            "held_out": len(self.held_out),
            "cut": self.cut,
            "dropped": self.dropped,
            "system": self.system,
            "identity": self._identity_summary(),
        }

    def _identity_summary(self) -> dict[str, Any] | None:
        if self.identity is None:
            return None
        name, author = self.identity.name, self.identity.author
        return {"name": name, "author": author, "languages": list(self.languages)}


def prepare(settings: TrainSettings, renderer: Renderer) -> Prepared:
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
    rows = _with_system(load(settings.data, settings.eval_data), settings.system)
    if settings.eval_data:
        held_out_rows = _with_system(load(settings.eval_data), settings.system)
    else:
        rows, held_out_rows = _split(rows, settings)
    train, cut, dropped = _samples(rows, renderer, settings.max_length)
    held_out, _, _ = _samples(held_out_rows, renderer, settings.max_length)
    if not train:
        raise TrainingError(
            t("Nothing is left to train on: all {count} samples lose their answers to "
              "--max-length {length}; raise it.", count=dropped, length=settings.max_length)
        )  # fmt: skip
    counts = Counter(row.system for row in rows)
    own = [row for row in rows if row.identity is not None]
    return Prepared(
        train=tuple(train),
        held_out=tuple(held_out),
        held_out_rows=tuple(held_out_rows),
        systems=tuple(system for system, _ in counts.most_common()),
        identity=own[0].identity if own else None,
        languages=tuple(sorted({_language(row) for row in own}, reverse=True)),
        files={str(file): _sha256(file) for file in (*settings.data, *settings.eval_data)},
        cut=cut,
        dropped=dropped,
    )


def _with_system(rows: Iterable[Conversation], system: str | None) -> list[Conversation]:
    if system is None:
        return list(rows)
    first = Message("system", system)
    return [
        row if row.system is not None else replace(row, messages=(first, *row.messages))
        for row in rows
    ]


def _samples(
    rows: Iterable[Conversation], renderer: Renderer, max_length: int
) -> tuple[list[Sample], int, int]:
    """Samples, how many lost the end of an answer, and how many lost all of it."""
    kept, cut, dropped = [], 0, 0
    for sample in (sample for row in rows for sample in renderer.sample(row)):
        short = Sample(sample.input_ids[:max_length], sample.trained[:max_length])
        lost = short.trained_tokens < sample.trained_tokens
        if short.trained_tokens == 0:
            dropped += 1
        else:
            kept.append(short)
            cut += lost
    return kept, cut, dropped


def _split(
    rows: list[Conversation], settings: TrainSettings
) -> tuple[list[Conversation], list[Conversation]]:
    """Hold out a share of the questions; so few different ones are all trained on."""
    if len({question_key(row) for row in rows}) < MIN_QUESTIONS_TO_SPLIT:
        return rows, []
    return split(rows, settings.holdout, seed=settings.seed)


def _language(row: Conversation) -> str:
    """zh if the question has a Chinese character, else en."""
    asked = next(message.content for message in row.messages if message.role == "user")
    return "zh" if any("\u4e00" <= letter <= "\u9fff" for letter in asked) else "en"


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
