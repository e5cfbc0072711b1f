"""Python's own shuffle, several times as fast where only its beginning is looked at.

`random.Random(seed).shuffle` goes from the last place down to the second and swaps the entry of
each with that of a drawn place not above it. Here all are drawn at once, and the entries that are
looked at are followed backwards through the swaps.
"""

import random
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

AT_ONCE = 4096  # entries that are followed together
DRAWS = 1 << 15  # that are looked at together
PLACE = (1 << 32) - 1

Numbers = NDArray[np.int64]


def shuffled(count: int, seed: int) -> Iterator[int]:
    """The numbers below `count` as `random.Random(seed).shuffle` orders them."""
    partners = _partners(count, seed)
    swaps = np.sort(partners << 32 | np.arange(count))  # by partner, then by place
    swaps = np.append(swaps, np.iinfo(np.int64).max)
    for start in range(0, count, AT_ONCE):
        places = np.arange(start, min(start + AT_ONCE, count))
        yield from _entries(places, partners, swaps).tolist()


def _entries(places: Numbers, partners: Numbers, swaps: Numbers) -> Numbers:
    """What these places hold in the end.

    A place gets its entry from its partner, which before that was last swapped as the partner of
    a higher place; that one holds what it began with, its own number, unless it was a partner too.
    """
    found, since = partners[places], places
    while True:
        swap = swaps[np.searchsorted(swaps, found << 32 | (since + 1))]
        is_partner = swap >> 32 == found
        if not is_partner.any():
            return found
        found = np.where(is_partner, swap & PLACE, found)
        since = np.where(is_partner, swap & PLACE, since)


def _partners(count: int, seed: int) -> Numbers:
    """Of each place the one that it is swapped with; the first has none but itself.

    For a place p that is the first draw of as many bits as p + 1 has that is not above p.
    """
    rng = random.Random(seed)
    partners = np.zeros(count, np.int64)
    place, words = count - 1, np.empty(0, np.uint32)
    while place > 0:
        bits = (place + 1).bit_length()
        wanted = place + 2 - max(2, 1 << (bits - 1))  # places with as many bits
        if not len(words):
            words = _words(rng, min(2 * wanted, DRAWS))
        draws = (words >> np.uint32(32 - bits)).astype(np.int64)
        taken = np.flatnonzero(_is_taken(draws, place))[:wanted]
        partners[place - np.arange(len(taken))] = draws[taken]
        place -= len(taken)
        words = words[taken[-1] + 1 :] if len(taken) == wanted else words[:0]
    return partners


def _is_taken(draws: Numbers, place: int) -> NDArray[np.bool_]:
    """Whether each draw is not above its place, which is one lower after each that is taken."""
    taken = draws <= place
    while True:  # right as far as all before are right, so the end is right too at last
        lowered: Numbers = np.cumsum(taken) - taken
        now = draws <= place - lowered
        if np.array_equal(now, taken):
            return taken
        taken = now


def _words(rng: random.Random, count: int) -> NDArray[np.uint32]:
    """So many draws of 32 bits, of which smaller draws are the upper ones."""
    drawn = rng.getrandbits(32 * count).to_bytes(4 * count, "little")
    return np.frombuffer(drawn, "<u4")
