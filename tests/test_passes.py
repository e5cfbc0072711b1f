"""A step in passes: nothing is lost, the bound holds, and what begins alike stays together."""

import math
import random
from collections import Counter
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.packs import Group, Sample, pack
from tunesmith.data.passes import AT_ONCE, passes, unique_tokens

samples = st.lists(st.integers(0, 1), min_size=1, max_size=40).map(
    lambda ids: Sample(tuple(ids), (True,) * len(ids))
)
groups = st.lists(st.lists(samples, min_size=1, max_size=2).map(tuple), min_size=1, max_size=12)


def sample(*ids: int) -> Sample:
    return Sample(ids, (True,) * len(ids))


def drawn(rng: random.Random, size: int, prefix: tuple[int, ...] = ()) -> Group:
    return (sample(*prefix, *(rng.randrange(50_000) for _ in range(size))),)


def sizes(cut: list[list[Sample]]) -> list[int]:
    return [len(pack(some).tokens) for some in cut]


@given(groups, st.integers(1, 100))
def test_nothing_is_lost_groups_stay_whole_and_the_bound_holds(
    step: list[Group], tokens: int
) -> None:
    cut = list(passes(step, tokens))
    assert Counter(chain.from_iterable(cut)) == Counter(chain.from_iterable(step))
    for some, size in zip(cut, sizes(cut), strict=True):
        left = Counter(some)
        whole = [group for group in step if not Counter(group) - left]
        assert set(chain.from_iterable(whole)) == set(some)
        assert size <= tokens or any(Counter(group) == left for group in step)


@given(groups, st.integers(1, 100), st.randoms(use_true_random=False))
def test_the_order_of_groups_does_not_matter(
    step: list[Group], tokens: int, rng: random.Random
) -> None:
    shuffled = rng.sample(step, len(step))
    assert list(passes(step, tokens)) == list(passes(shuffled, tokens))


@given(groups)
def test_the_count_of_unique_tokens_is_never_too_low(step: list[Group]) -> None:
    assert unique_tokens(step) >= len(pack([*chain.from_iterable(step)]).tokens)


def test_a_chat_step_is_cut_into_the_fewest_passes_of_one_size() -> None:
    rng = random.Random(0)
    lengths = [min(2048, max(32, round(240 * math.exp(0.7 * rng.gauss(0, 1))))) for _ in range(64)]
    seen = sizes(list(passes([drawn(rng, length) for length in lengths], 4096)))
    assert len(seen) == math.ceil(sum(lengths) / 4096)
    assert min(seen) > 0.95 * max(seen)


def test_sharing_is_no_worse_than_in_the_order_of_the_tokens() -> None:
    """Two system prompts, as in an identity set; the other cut is by count, alike ones adjacent."""
    rng = random.Random(0)
    systems = tuple(range(130)), tuple(range(5, 135))
    step = [drawn(rng, rng.randrange(10, 40), rng.choice(systems)) for _ in range(64)]
    ordered = sorted(step, key=lambda group: group[0].input_ids)
    for tokens in (512, 1024, 4096):
        cut = list(passes(step, tokens))
        each = math.ceil(len(step) / len(cut))
        by_count = [
            list(chain.from_iterable(ordered[start : start + each]))
            for start in range(0, len(step), each)
        ]
        assert sum(sizes(cut)) <= sum(sizes(by_count))
        assert max(sizes(cut)) <= tokens


def test_a_step_of_very_many_groups() -> None:
    rng = random.Random(0)
    step = [drawn(rng, 20) for _ in range(3 * AT_ONCE)]
    assert max(sizes(list(passes(step, 1000)))) <= 1000
