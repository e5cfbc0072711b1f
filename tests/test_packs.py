"""Packs say the same as their samples, with equal work done once."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.packs import MIN_SHARED, Pack, Sample, pack

samples = st.lists(
    st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=40).map(
        lambda pairs: Sample(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))
    ),
    min_size=1,
    max_size=8,
)


def paths(packed: Pack) -> list[tuple[int, ...]]:
    """For each segment, the indices of the tokens its last query sees."""
    return [
        tuple(
            index
            for node in segment.path
            for index in range(packed.segments[node].start, packed.segments[node].stop)
        )
        for segment in packed.segments
    ]


def said(group: list[Sample]) -> Counter[tuple[tuple[int, ...], int]]:
    """Every (context, next token) the samples train, with how often."""
    return Counter(
        (sample.input_ids[:i], sample.input_ids[i])
        for sample in group
        for i in range(1, len(sample.input_ids))
        if sample.trained[i]
    )


def said_by_pack(packed: Pack) -> Counter[tuple[tuple[int, ...], int]]:
    contexts = {
        path[position]: tuple(packed.tokens[index] for index in path[: position + 1])
        for path in paths(packed)
        for position in range(len(path))
    }
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for index, target, weight in packed.targets:
        found[contexts[index], target] += int(weight)
    return found


@given(samples, st.booleans())
def test_a_pack_trains_what_its_samples_train(group: list[Sample], share: bool) -> None:
    assert said_by_pack(pack(group, share=share)) == said(group)


@given(samples, st.booleans())
def test_positions_count_along_the_path_and_segments_tile_the_row(
    group: list[Sample], share: bool
) -> None:
    packed = pack(group, share=share)
    for path in paths(packed):
        assert [packed.positions[index] for index in path] == list(range(len(path)))
    tiles = [(segment.start, segment.stop) for segment in packed.segments]
    assert [start for start, _ in tiles] == [0, *(stop for _, stop in tiles[:-1])]
    assert tiles[-1][1] == len(packed.tokens)
    assert packed.real_tokens == sum(len(sample.input_ids) for sample in group)


@given(samples)
def test_the_order_of_samples_does_not_matter(group: list[Sample]) -> None:
    assert pack(group) == pack(list(reversed(group)))


def test_copies_cost_one_sample() -> None:
    sample = Sample(tuple(range(30)), (False,) * 10 + (True,) * 20)
    packed = pack([sample] * 7)
    assert len(packed.tokens) == 30
    assert packed.weight == 7 * 20


def test_a_shared_system_prompt_appears_once_and_short_prefixes_are_not_split_off() -> None:
    system = tuple(range(100, 100 + MIN_SHARED))
    long = [Sample((*system, n, n + 1), (False,) * MIN_SHARED + (True, True)) for n in range(3)]
    packed = pack(long)
    assert packed.tokens.count(100) == 1
    assert [segment.path for segment in packed.segments] == [(0,), (0, 1), (0, 2), (0, 3)]
    assert [row for row in packed.targets if row[0] == MIN_SHARED - 1] == [
        (MIN_SHARED - 1, n, 1.0) for n in range(3)
    ]  # where samples part, one token has several targets
    short = [Sample((1, 2, n), (False, True, True)) for n in range(3)]
    assert [segment.path for segment in pack(short).segments] == [(0,), (1,), (2,)]


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="needs samples"):
        pack([])
    with pytest.raises(ValueError, match="needs samples"):
        pack([Sample((), ())])
