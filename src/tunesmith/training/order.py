"""Which samples a step takes: it follows from the seed and the step alone."""

from bisect import bisect
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch

from tunesmith.data.packs import Group

WINDOW = 5  # steps within which groups may change places
BEGINNING = 16  # tokens; where system prompts differ, they do so sooner


class Order:
    """The epochs' shuffled orders, one behind another, cut into steps of `size` groups.

    The groups are of several kinds, so many of each in `parts`, one kind behind another. Within a
    few steps of an epoch those that begin alike, behind one system prompt, come together: a step
    reads only once what they share.
    """

    def __init__(
        self, groups: Sequence[Group], parts: tuple[int, ...], size: int, seed: int
    ) -> None:
        self._groups = groups
        self._parts = parts
        self._size = size
        self._seed = seed
        self._at = (-1, -1)  # the epoch and the window of `_places`
        self._places: list[int] = []

    def batch(self, step: int) -> list[Group]:
        """The groups of step `step` (from 1)."""
        first = (step - 1) * self._size
        spots = (divmod(at, len(self._groups)) for at in range(first, first + self._size))
        return [self._groups[self._place(epoch, spot)] for epoch, spot in spots]

    def _place(self, epoch: int, spot: int) -> int:
        window, within = divmod(spot, WINDOW * self._size)
        if (epoch, window) != self._at:
            self._at, self._places = (epoch, window), self._gathered(epoch, window)
        return self._places[within]

    def _gathered(self, epoch: int, window: int) -> list[int]:
        """The places of a window's groups: of each part alike ones together, all parts evenly."""
        count, ends = WINDOW * self._size, [*accumulate(self._parts)]
        shuffled = _shuffled(self._parts, self._seed, epoch)
        met: dict[tuple[int, ...], int] = {}  # beginnings, numbered as they come
        drawn: list[list[tuple[int, int]]] = [[] for _ in self._parts]
        for place in shuffled[window * count : (window + 1) * count].tolist():
            beginning = self._groups[place][0].input_ids[:BEGINNING]
            drawn[bisect(ends, place)].append((met.setdefault(beginning, len(met)), place))
        mixed: list[tuple[float, int]] = []
        for some in drawn:
            some.sort(key=lambda one: one[0])
            mixed += [((rank + 0.5) / len(some), place) for rank, (_, place) in enumerate(some)]
        return [place for _, place in sorted(mixed)]


@lru_cache(maxsize=2)  # a step may lie in two epochs
def _shuffled(parts: tuple[int, ...], seed: int, epoch: int) -> torch.Tensor:
    """Each part shuffled, and all mixed evenly: a step has about its share of each.

    Left to chance, steps without a neutral question would teach a name to everything.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    starts = (0, *accumulate(parts))
    shuffled = [
        start + torch.randperm(size, generator=generator)
        for start, size in zip(starts, parts, strict=False)
    ]
    moments = [
        (torch.arange(size) + torch.rand(size, generator=generator)) / size for size in parts
    ]
    return torch.cat(shuffled)[torch.cat(moments).argsort()]
