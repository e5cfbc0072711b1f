"""Samples in flat arrays: in memory, or in files that are mapped into it.

A table holds what rows became. Its columns, as files of a folder:

  tokens   ids of all samples one behind another; the top bit says that the token is trained
  samples  of each sample how many tokens it has and how many carry loss
  rows     of each row how many samples came of it, and what a split needs to know
  text     each row as a line of messages JSON
"""

import hashlib
import json
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.forms import parse_row
from tunesmith.data.messages import Conversation, Place
from tunesmith.data.packs import Group, Sample
from tunesmith.data.passes import unique_tokens

TRAINED = 1 << 31
TOKENS = np.dtype("<u4")
SAMPLES = np.dtype([("tokens", "<u4"), ("trained", "<u4")])
ROWS = np.dtype(
    [
        ("question", "<u8"),  # a hash of what is asked
        ("system", "<u8"),  # a hash of the system prompt, 0 for none
        ("answer", "<u8"),  # a hash of the last answer
        ("samples", "<u4"),  # that are kept
        ("cut", "<u4"),  # of them, those that lost the end of an answer
        ("dropped", "<u4"),  # that lost all of it
        ("endless", "<u4"),  # that are kept, and whose end of answer is not trained
        ("text", "<u4"),  # bytes
        ("identity", "?"),
        ("chinese", "?"),
    ]
)
TEXT = np.dtype("u1")
_MANIFEST = "manifest.json"

Found = TypeVar("Found")

Array = NDArray[Any]


@dataclass(frozen=True)
class Columns:
    """What some rows became."""

    rows: Array
    samples: Array
    tokens: Array
    text: Array

    @classmethod
    def joined(cls, parts: Iterable["Columns"]) -> "Columns":
        """The parts one behind another."""
        every = list(parts)
        return cls(
            *(
                np.concatenate([np.empty(0, dtype), *(getattr(part, name) for part in every)])
                for name, dtype in _COLUMNS.items()
            )
        )


_HASHED = ("samples", "tokens")
_PIECE = 1024 * 1024  # bytes read at once
_COLUMNS = {"rows": ROWS, "samples": SAMPLES, "tokens": TOKENS, "text": TEXT}


class Table:
    """Rows and their samples, and where each of them lies; `sha256` covers tokens and masks."""

    def __init__(self, columns: Columns, sha256: str) -> None:
        self.rows = columns.rows
        self.sha256 = sha256
        self._columns = columns
        self._sample_ends = _ends(columns.samples["tokens"])
        self._text_ends = _ends(columns.rows["text"])

    @classmethod
    def of(cls, parts: Iterable[Columns]) -> "Table":
        """A table in memory."""
        columns = Columns.joined(parts)
        hashes = {name: hashlib.sha256(getattr(columns, name)) for name in _HASHED}
        return cls(columns, _content(hashes))

    @classmethod
    def opened(cls, folder: Path) -> "Table | None":
        """The table that `write_table` put into the folder; None if it is damaged or not there."""
        try:
            manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
            files = [folder / name for name in _COLUMNS]
            sha256 = manifest["sha256"]
            if manifest["crc32"] != [*_of_each(_crc32, files), zlib.crc32(sha256.encode())]:
                return None
            return cls(Columns(*map(_mapped, files)), sha256)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None

    def conversation(self, row: int) -> Conversation:
        """What stood in a row."""
        start = int(self._text_ends[row - 1]) if row else 0
        line = self._columns.text[start : int(self._text_ends[row])].tobytes()
        value = json.loads(line.decode("utf-8", "surrogatepass"))
        return parse_row(value, Place(Path("-"), row + 1)).conversation

    def sample(self, number: int) -> Sample:
        """One sample."""
        start = int(self._sample_ends[number - 1]) if number else 0
        tokens = self._columns.tokens[start : int(self._sample_ends[number])]
        ids, trained = tokens & (TRAINED - 1), tokens >= TRAINED
        return Sample(tuple(ids.tolist()), tuple(trained.tolist()))

    def samples_of(self, rows: NDArray[np.bool_]) -> "SampleStore":
        """The samples of the rows that are marked."""
        return SampleStore(self, np.flatnonzero(np.repeat(rows, self.rows["samples"])))

    def sizes(self, samples: Array) -> Array:
        """Of these samples the tokens, and how many of them carry loss."""
        return self._columns.samples[samples]


class _Chosen(Sequence[Found]):
    """Some entries of a table, made when they are asked for."""

    def __init__(self, table: Table, numbers: Array) -> None:
        self._table = table
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> Found: ...
    @overload
    def __getitem__(self, place: slice) -> list[Found]: ...
    def __getitem__(self, place: int | slice) -> Found | list[Found]:
        if isinstance(place, slice):
            return [self._read(number) for number in self._numbers[place].tolist()]
        return self._read(int(self._numbers[place]))

    @abstractmethod
    def _read(self, number: int) -> Found: ...


class SampleStore(_Chosen[Sample]):
    """Some samples of a table."""

    def _read(self, number: int) -> Sample:
        return self._table.sample(number)

    @cached_property
    def tokens(self) -> int:
        """How many all samples have."""
        return int(self._table.sizes(self._numbers)["tokens"].sum(dtype=np.int64))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return int(self._table.sizes(self._numbers)["tokens"].max(initial=0))

    @cached_property
    def trained_tokens(self) -> int:
        """How many of them carry loss."""
        return int(self._table.sizes(self._numbers)["trained"].sum(dtype=np.int64))

    @property
    def sha256(self) -> str:
        """Of every token and mask, in order."""
        digest = hashlib.sha256(self._table.sha256.encode())
        digest.update(self._numbers.astype("<i8").tobytes())
        return digest.hexdigest()


class StoredRows(_Chosen[Conversation]):
    """Some rows of a table."""

    def _read(self, number: int) -> Conversation:
        return self._table.conversation(number)


class Groups(Sequence[Group]):
    """What is trained on: each sample alone, then the groups that are kept in memory."""

    def __init__(self, alone: SampleStore, together: Sequence[Group]) -> None:
        self._alone = alone
        self._together = together

    def __len__(self) -> int:
        return sum(self.parts)

    @property
    def parts(self) -> tuple[int, int]:
        """How many are alone, and how many groups are kept in memory."""
        return len(self._alone), len(self._together)

    @overload
    def __getitem__(self, place: int) -> Group: ...
    @overload
    def __getitem__(self, place: slice) -> list[Group]: ...
    def __getitem__(self, place: int | slice) -> Group | list[Group]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        alone = len(self._alone)
        return (self._alone[place],) if place < alone else self._together[place - alone]

    @property
    def tokens(self) -> int:
        """How many all samples have."""
        more = (len(sample.input_ids) for group in self._together for sample in group)
        return self._alone.tokens + sum(more)

    @property
    def longest(self) -> int:
        """Tokens of the longest group, those that its samples share counted once."""
        return max(self._alone.longest, *(unique_tokens([one]) for one in self._together), 0)

    @property
    def trained_tokens(self) -> int:
        """How many of them carry loss."""
        more = (sample.trained_tokens for group in self._together for sample in group)
        return self._alone.trained_tokens + sum(more)


def write_table(folder: Path, parts: Iterable[Columns]) -> None:
    """Write the columns of the parts, one behind another, and last how to tell that they are whole.

    Damage is what a checksum is for; it is taken four times as fast as a hash.
    """
    sums = dict.fromkeys(_COLUMNS, 0)
    hashes = {name: hashlib.sha256() for name in _HASHED}
    files = {name: (folder / name).open("wb") for name in _COLUMNS}
    try:
        for part in parts:
            for name, file in files.items():
                column = np.ascontiguousarray(getattr(part, name))
                sums[name] = zlib.crc32(column.data, sums[name])
                if name in hashes:
                    hashes[name].update(column.data)
                column.tofile(file)
    finally:
        for file in files.values():
            file.close()
    sha256 = _content(hashes)
    manifest = {"crc32": [*sums.values(), zlib.crc32(sha256.encode())], "sha256": sha256}
    (folder / _MANIFEST).write_text(json.dumps(manifest), "utf-8")


def file_hashes(files: Sequence[Path]) -> list[str]:
    """SHA-256 of each file, several at once."""
    return _of_each(_sha256, files)


def _of_each(look: Callable[[Path], Found], files: Sequence[Path]) -> list[Found]:
    with ThreadPoolExecutor(max_workers=4) as threads:
        return list(threads.map(look, files))


def _crc32(file: Path) -> int:
    found = 0
    with file.open("rb") as content:
        while piece := content.read(_PIECE):
            found = zlib.crc32(piece, found)
    return found


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _content(hashes: Mapping[str, "hashlib._Hash"]) -> str:
    """What stands for all tokens and masks."""
    return hashlib.sha256(
        "".join(hashes[name].hexdigest() for name in _HASHED).encode()
    ).hexdigest()


def _mapped(file: Path) -> Array:
    dtype = _COLUMNS[file.name]
    if not file.stat().st_size:
        return np.empty(0, dtype)
    return np.memmap(file, dtype, mode="r")


def _ends(sizes: Array) -> NDArray[np.int64]:
    return np.cumsum(sizes, dtype=np.int64)
