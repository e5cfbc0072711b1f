"""The order of Python's shuffle."""

import random
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.shuffle import shuffled


def by_python(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


@given(st.integers(0, 600), st.integers(0, 2**40))
def test_it_is_pythons_own_order(count: int, seed: int) -> None:
    assert list(shuffled(count, seed)) == by_python(count, seed)


@pytest.mark.parametrize("count", [4095, 4096, 4097, 2**15, 2**15 + 1, 70_001])
def test_it_is_also_of_many(count: int) -> None:
    assert list(shuffled(count, 42)) == by_python(count, 42)


def test_its_beginning_is_that_of_the_whole() -> None:
    assert list(islice(shuffled(300_000, 7), 5000)) == by_python(300_000, 7)[:5000]
