"""Tiles: what lies in them, and attention in them as that of one segment after another."""

from collections.abc import Sequence
from random import Random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tunesmith.data.packs import Segment
from tunesmith.training import tiles
from tunesmith.training.forward import PackAttention, packed_attention
from tunesmith.training.tiles import Tiles

CPU = torch.device("cpu")


def tree(seed: int, count: int, longest: int) -> list[Segment]:
    """Segments that hang on earlier ones, or on none."""
    random = Random(seed)
    segments: list[Segment] = []
    for number in range(count):
        start = segments[-1].stop if segments else 0
        above = random.choice([(), *(segment.path for segment in segments)])
        segments.append(Segment(start, start + random.randint(1, longest), (*above, number)))
    return segments


def path(segments: Sequence[Segment], segment: Segment) -> list[int]:
    return [token for at in segment.path for token in range(segments[at].start, segments[at].stop)]


def one_by_one(
    segments: Sequence[Segment], q: Tensor, k: Tensor, v: Tensor, window: int | None
) -> Tensor:
    """Each query over the keys before it on its path."""
    groups = q.shape[1] // k.shape[1]
    rows = []
    for segment in segments:
        seen = path(segments, segment)
        for place in range(len(seen) - segment.stop + segment.start, len(seen)):
            keys = seen[max(0, place + 1 - (window or place + 1)) : place + 1]
            own_k, own_v = (part[:, :, keys].repeat_interleave(groups, 1) for part in (k, v))
            rows.append(scaled_dot_product_attention(q[:, :, seen[place], None], own_k, own_v))
    return torch.cat(rows, 2).transpose(1, 2)


@pytest.mark.parametrize("seed", range(5))
def test_every_segment_lies_in_one_tile_and_tiles_are_well_filled(seed: int) -> None:
    segments = tree(seed, count=30, longest=40)
    made = Tiles(segments, CPU)
    sizes = sorted(
        (own, seen) for tile in made.tiles for own, seen in zip(tile.own, tile.seen, strict=True)
    )
    assert sizes == sorted(
        (segment.stop - segment.start, len(path(segments, segment))) for segment in segments
    )
    assert made.queries[made.places].tolist() == list(range(segments[-1].stop))
    for tile in made.tiles:
        needed = sum(own * seen for own, seen in zip(tile.own, tile.seen, strict=True))
        assert len(tile.own) * tile.queries * tile.keys <= tiles.PADDED * needed
    assert len(made.tiles) < len(segments) / 2


def test_a_tile_has_no_more_scores_than_it_may_unless_one_segment_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiles, "TOGETHER", 100)
    lengths = [5, 5, 5, 5, 5, 30]
    stops = [sum(lengths[: end + 1]) for end in range(len(lengths))]
    segments = [
        Segment(stop - length, stop, (number,))
        for number, (length, stop) in enumerate(zip(lengths, stops, strict=True))
    ]
    assert [tile.own for tile in Tiles(segments, CPU).tiles] == [(5,) * 4, (5,), (30,)]


@pytest.mark.parametrize("window", [None, 3, 1])
@pytest.mark.parametrize("softcap", [None, 1e6])
@pytest.mark.parametrize("seed", range(3))
def test_attention_and_its_gradients_are_those_of_one_query_after_another(
    seed: int, window: int | None, softcap: float | None
) -> None:
    segments = tree(seed, count=12, longest=9)
    torch.manual_seed(seed)
    size = segments[-1].stop
    parts = [torch.randn(1, heads, size, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    outer = torch.randn(1, size, 4, 8, dtype=torch.float64)

    def outcome(*, ours: bool) -> list[Tensor]:
        q, k, v = (part.clone().requires_grad_() for part in parts)
        if ours:
            output, _ = packed_attention(
                torch.nn.Module(), q, k, v, None, pack_attention=PackAttention(segments, CPU),
                sliding_window=window, softcap=softcap,
            )  # fmt: skip
        else:
            output = one_by_one(segments, q, k, v, window)
        torch.autograd.backward(output, outer)
        return [output, *(part.grad for part in (q, k, v) if part.grad is not None)]

    for found, right in zip(outcome(ours=True), outcome(ours=False), strict=True):
        torch.testing.assert_close(found, right, atol=1e-6, rtol=1e-6)
