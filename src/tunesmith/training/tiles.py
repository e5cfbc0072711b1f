"""Tiles: segments of about one size side by side, so that a few calls do the attention of all.

A pack of a few hundred tokens has dozens of segments, and to call a product for each costs more
than the products.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.data.packs import Segment

PADDED = 2.0  # scores of a tile for one that is needed, at most
TOGETHER = 2**17  # scores of a head in a tile, unless one segment has more


@dataclass(frozen=True)
class Tile:
    """Segments by how many tokens each has, `own`, and how many its path has, `seen`."""

    own: tuple[int, ...]
    seen: tuple[int, ...]

    @property
    def queries(self) -> int:
        """Of the longest segment: L."""
        return max(self.own)

    @property
    def keys(self) -> int:
        """Of the longest path: S."""
        return max(self.seen)

    @property
    def is_causal(self) -> bool:
        """Whether a query sees the keys up to its own number: each segment is a root."""
        return self.own == self.seen

    def mask(self, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What is added to scores, (segments, 1, L, S): -inf where a query does not see a key."""
        before = torch.tensor([seen - own for own, seen in zip(self.own, self.seen, strict=True)])
        place = before[:, None, None] + torch.arange(self.queries)[:, None]
        place.clamp_(max=self.keys - 1)  # a query that is padding sees something too
        distance = place - torch.arange(self.keys)
        unseen = distance < 0 if window is None else (distance < 0) | (distance >= window)
        mask = torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, float("-inf"))
        return mask[:, None].to(device)


class Tiles:
    """The tiles of a pack, and which of its tokens lie in them.

    Attributes:
        tiles: How large each is.
        queries: The tokens of all tiles' queries, one tile behind another; padding is token 0.
        keys: Likewise those of the keys.
        places: Where among the queries each token of the pack is.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.tiles: list[Tile] = []
        queries: list[int] = []
        keys: list[int] = []
        places = [0] * sum(segment.stop - segment.start for segment in segments)
        for alike in _alike(segments):
            tile = _tile(alike)
            for segment, seen in alike:
                own = range(segment.start, segment.stop)
                places[segment.start : segment.stop] = range(len(queries), len(queries) + len(own))
                queries += _padded(own, tile.queries)
                keys += _padded(seen, tile.keys)
            self.tiles.append(tile)
        self.queries = torch.tensor(queries, device=device)
        self.keys = torch.tensor(keys, device=device)
        self.places = torch.tensor(places, device=device)

    def split(
        self, q: Tensor, k: Tensor, v: Tensor
    ) -> Iterator[tuple[Tile, Tensor, Tensor, Tensor]]:
        """Of each tile its queries (N, H, L, d), keys and values (N, H_kv, S, d).

        `q` has shape (1, H, U, d), `k` and `v` (1, H_kv, U, d).
        """
        queries = [(len(tile.own), tile.queries) for tile in self.tiles]
        keys = [(len(tile.own), tile.keys) for tile in self.tiles]
        parts = _parts(q, self.queries, queries), _parts(k, self.keys, keys)
        return zip(self.tiles, *parts, _parts(v, self.keys, keys), strict=True)

    def join(self, outputs: Sequence[Tensor]) -> Tensor:
        """The tiles' outputs, each (N, H, L, d), as those of the pack's tokens: (1, U, H, d)."""
        _, heads, _, size = outputs[0].shape
        rows = torch.cat([each.transpose(1, 2).reshape(-1, heads * size) for each in outputs])
        return _rows(rows, self.places).view(1, -1, heads, size)


class Rows(torch.autograd.Function):
    """The rows of x (U, D) that an index (N,) names, some of them several times, some never."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        """Return (N, D)."""
        ctx.save_for_backward(index)
        ctx.count = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of x, summed in float32 or finer."""
        (index,), (gradient,) = ctx.saved_tensors, gradients
        exact = torch.promote_types(gradient.dtype, torch.float32)
        of_x = gradient.new_zeros(ctx.count, gradient.shape[1], dtype=exact)
        return of_x.index_add_(0, index, gradient.to(exact)).to(gradient.dtype), None


def _rows(x: Tensor, index: Tensor) -> Tensor:
    rows: Tensor = Rows.apply(x, index)  # type: ignore[no-untyped-call]
    return rows


def _parts(whole: Tensor, index: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The tokens that the index names, so many times so many for each tile, (N, H, length, d)."""
    _, heads, _, size = whole.shape
    rows = _rows(whole.transpose(1, 2).reshape(-1, heads * size), index)
    parts = torch.split(rows, [count * length for count, length in shapes])
    return [
        part.view(*shape, heads, size).transpose(1, 2)
        for part, shape in zip(parts, shapes, strict=True)
    ]


Alike = list[tuple[Segment, list[int]]]
"""Segments of about one size, each with the tokens of its path."""


def _alike(segments: Sequence[Segment]) -> Iterator[Alike]:
    """The segments by size, cut wherever one more would leave too much of a tile unused."""
    every = [
        (one, [token for at in one.path for token in range(segments[at].start, segments[at].stop)])
        for one in segments
    ]
    some: Alike = []
    for one in sorted(every, key=lambda one: (len(one[1]), one[0].stop - one[0].start)):
        if some and not _fits(_tile([*some, one])):
            yield some
            some = []
        some.append(one)
    yield some


def _fits(tile: Tile) -> bool:
    scores = len(tile.own) * tile.queries * tile.keys
    needed = sum(own * seen for own, seen in zip(tile.own, tile.seen, strict=True))
    return scores <= min(PADDED * needed, TOGETHER)


def _tile(segments: Alike) -> Tile:
    return Tile(
        tuple(segment.stop - segment.start for segment, _ in segments),
        tuple(len(seen) for _, seen in segments),
    )


def _padded(tokens: Sequence[int], length: int) -> list[int]:
    return [*tokens, *[0] * (length - len(tokens))]
