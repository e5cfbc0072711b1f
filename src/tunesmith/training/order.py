"""Which samples a step takes: it follows from the seed and the step alone."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch

from tunesmith.data.packs import Group


def batch(
    groups: Sequence[Group], parts: tuple[int, ...], step: int, size: int, seed: int
) -> list[Group]:
    """The groups of step `step` (from 1): the epochs' shuffled orders, one behind another.

    The groups are of several kinds, so many of each in `parts`, one kind behind another.
    """
    first = (step - 1) * size
    places = (divmod(place, len(groups)) for place in range(first, first + size))
    return [groups[int(_order(parts, seed, epoch)[place])] for epoch, place in places]


@lru_cache(maxsize=2)  # a step may lie in two epochs
def _order(parts: tuple[int, ...], seed: int, epoch: int) -> torch.Tensor:
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
