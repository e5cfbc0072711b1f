"""Packs: the samples of a step as one structure in which equal work is done once.

Samples that begin alike form a prefix tree. Each node's tokens appear once in the pack, and the
node attends to its own tokens and those on its path from the root. A plain batch is the special
case in which nothing is shared.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import log

# A node shorter than this costs more in attention calls than its tokens are worth.
MIN_SHARED = 8

ROUNDING = 1e-6  # of probabilities in float32 that sum to 1

Distribution = tuple[tuple[int, float], ...]
"""Token ids with their probabilities; what these lack of 1 is for all other tokens together."""


@dataclass(frozen=True)
class Sample:
    """Token ids, and for each whether the model is trained to say it.

    `soft` replaces what is to be said: a distribution for each trained token after the first
    token, in order. Empty means the tokens themselves.
    """

    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    soft: tuple[Distribution, ...] = ()

    @property
    def trained_tokens(self) -> int:
        """How many tokens carry loss; the first token has no context to be predicted from."""
        return sum(self.trained[1:])

    @property
    def entropy(self) -> float:
        """Of the soft targets, in nats: the loss that no training can take away."""
        shares = ((*(share for _, share in what), rest(what)) for what in self.soft)
        return -sum(p * log(p) for what in shares for p in what if p > 0)

    def said(self) -> list[tuple[int, Distribution]]:
        """(position, what is to be said after it), where the model is trained."""
        places = [place for place in range(1, len(self.input_ids)) if self.trained[place]]
        said = self.soft or [((self.input_ids[place], 1.0),) for place in places]
        return [(place - 1, what) for place, what in zip(places, said, strict=True)]


def rest(what: Distribution) -> float:
    """The probability of all tokens that are not named; 0 where rounding alone is missing."""
    missing = 1 - sum(share for _, share in what)
    return missing if missing > ROUNDING else 0.0


Group = tuple[Sample, ...]
"""Samples that stay together in every step, since they begin alike; often just one."""


@dataclass(frozen=True)
class Segment:
    """One run of queries, `tokens[start:stop]`: a node of the prefix tree.

    `path` lists the segments from the root to this one, itself last. A query sees the tokens of
    all of them, of its own up to itself.
    """

    start: int
    stop: int
    path: tuple[int, ...]


@dataclass(frozen=True)
class Pack:
    """What one forward pass computes.

    `tokens` and `positions` have length U, the number of unique tokens. `targets` are triples
    (index into tokens, id to be said next, weight): a token shared by n samples weighs n, and a
    token where samples part, or whose target is soft, has several targets. `rest` has pairs (index
    into tokens, weight): so much is to be said there of tokens that are none of its targets.
    `real_tokens` counts the samples' tokens as if nothing were shared.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    segments: tuple[Segment, ...]
    targets: tuple[tuple[int, int, float], ...]
    rest: tuple[tuple[int, float], ...]
    real_tokens: int

    @property
    def weight(self) -> float:
        """Sum of the weights: the number of trained tokens."""
        return sum(weight for *_, weight in (*self.targets, *self.rest))


def pack(samples: Sequence[Sample], *, share: bool = True) -> Pack:
    """Pack samples, sharing equal prefixes unless `share` is off. Deterministic.

    Raises:
        ValueError: There are no samples, or one is empty.
    """
    if not samples or not all(sample.input_ids for sample in samples):
        raise ValueError("a pack needs samples, and each at least one token")
    builder = _Builder()
    groups = [sorted(samples, key=_order)] if share else [[sample] for sample in samples]
    for group in groups:
        builder.grow(group, 0, ())
    targets = tuple((*place, weight) for place, weight in builder.targets.items())
    return Pack(
        tokens=tuple(builder.tokens),
        positions=tuple(builder.positions),
        segments=tuple(builder.segments),
        targets=targets,
        rest=tuple(builder.rest.items()),
        real_tokens=sum(len(sample.input_ids) for sample in samples),
    )


class _Builder:
    """Walks the prefix tree depth first and lays its nodes out one behind another."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.segments: list[Segment] = []
        self.targets: defaultdict[tuple[int, int], float] = defaultdict(float)
        self.rest: defaultdict[int, float] = defaultdict(float)

    def grow(self, group: list[Sample], depth: int, path: tuple[int, ...]) -> None:
        """Lay out what the sorted `group` holds beyond `depth`, below the segments in `path`."""
        # of a sorted group's ends, that is the whole group's
        common = common_length(group[0].input_ids, group[-1].input_ids)
        all_equal = common == len(group[-1].input_ids)
        if all_equal or common - depth >= MIN_SHARED:
            path = (*path, len(self.segments))
            self._emit(group, depth, common, path)
            depth = common
        if not all_equal:
            for branch in _branches(group, common):
                if len(branch[0].input_ids) > depth:
                    self.grow(branch, depth, path)

    def _emit(self, group: list[Sample], depth: int, stop: int, path: tuple[int, ...]) -> None:
        start = len(self.tokens)
        self.tokens += group[0].input_ids[depth:stop]
        self.positions += range(depth, stop)
        self.segments.append(Segment(start, len(self.tokens), path))
        for sample in group:
            for place, what in sample.said():
                if depth <= place < stop:
                    for token, weight in what:
                        self.targets[start + place - depth, token] += weight
                    if missing := rest(what):
                        self.rest[start + place - depth] += missing


def _order(sample: Sample) -> tuple[object, ...]:
    return sample.input_ids, sample.trained, sample.soft


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix."""
    pairs = zip(first, second, strict=False)
    limit = min(len(first), len(second))
    return next((index for index, (a, b) in enumerate(pairs) if a != b), limit)


def _branches(group: list[Sample], depth: int) -> Iterator[list[Sample]]:
    """Split a sorted group by the token at `depth`; samples that end there come first."""
    for _, branch in groupby(group, key=lambda sample: sample.input_ids[depth : depth + 1]):
        yield list(branch)
