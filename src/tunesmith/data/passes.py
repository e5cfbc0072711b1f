"""Passes: a step's groups cut into forward passes of about equal size, alike ones together.

Bin packing in which what is put in costs less where something like it lies already: the largest
groups first, each into the pass where it adds the fewest tokens, and of those into the emptiest.
"""

from bisect import bisect, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

from tunesmith.data.packs import MIN_SHARED, Group, Sample, common_length

AT_ONCE = 256  # groups looked at together: the work grows with their square
UNEVEN = (1.02, 1.05, 1.1, 1.2, 1.4)  # how much fuller than the mean a pass may be, tried in turn


def passes(groups: Sequence[Group], tokens: int) -> Iterator[list[Sample]]:
    """Cut a step into passes of at most `tokens` unique tokens, as few and as even as they go.

    A group that alone has more gets a pass of its own. Deterministic, and independent of the order
    of the groups.
    """
    ordered = sorted(groups, key=_key)
    for start in range(0, len(ordered), AT_ONCE):
        some = ordered[start : start + AT_ONCE]
        for chosen in _cut(_Costs(some), tokens):
            yield [sample for place in chosen.places for sample in some[place]]


def unique_tokens(groups: Sequence[Group]) -> int:
    """At most so many tokens are different in a pass of these groups; never too few."""
    return _Costs(sorted(groups, key=_key)).together


class _Costs:
    """What groups add to a pass, never too little.

    The groups are sorted, so two of them share what all between them share. Of a shared prefix a
    pack may lay out the last tokens again (`MIN_SHARED`), so these are not counted as saved.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        stems = [_stem(group) for group in groups]
        saved = [_saved(a, b) for a, b in pairwise(stems)]
        self.alone = [_alone(group) for group in groups]
        self.together = sum(self.alone) - sum(saved)
        self._next = saved

    @cached_property
    def _rows(self) -> list[list[int]]:
        """For each group what it shares with those behind it."""
        return [list(accumulate(self._next[place:], min)) for place in range(len(self.alone))]

    def saved(self, first: int, second: int) -> int:
        """Tokens that two groups, `first` < `second`, need only once."""
        return self._rows[first][second - first - 1]

    def added(self, place: int, places: Sequence[int]) -> int:
        """Tokens that a group adds to a pass of the sorted `places`: its neighbours save most."""
        at = bisect(places, place)
        before = self.saved(places[at - 1], place) if at else 0
        after = self.saved(place, places[at]) if at < len(places) else 0
        return self.alone[place] - max(before, after)


@dataclass
class _Pass:
    places: list[int] = field(default_factory=list)
    tokens: int = 0


def _cut(costs: _Costs, limit: int) -> list[_Pass]:
    """As few passes as are found for the limit, then as even as they get without one more."""
    if costs.together <= limit:
        return [_Pass([*range(len(costs.alone))], costs.together)]
    found = _filled(costs, -(-costs.together // limit), limit)
    mean = sum(one.tokens for one in found) / len(found)
    for uneven in UNEVEN:
        tried = _filled(costs, len(found), min(limit, int(mean * uneven)))
        if len(tried) <= len(found):
            return tried
    return found


def _filled(costs: _Costs, count: int, limit: int) -> list[_Pass]:
    """Fill `count` passes up to the limit; more where they do not do."""
    found = [_Pass() for _ in range(count)]
    for place in sorted(range(len(costs.alone)), key=lambda place: (-costs.alone[place], place)):
        choices = [(costs.added(place, one.places), one.tokens, i) for i, one in enumerate(found)]
        fitting = [one for one in choices if one[0] + one[1] <= limit or not one[1]]
        if not fitting:
            fitting = [(costs.alone[place], 0, len(found))]
            found.append(_Pass())
        added, _, index = min(fitting)
        insort(found[index].places, place)
        found[index].tokens += added
    return [one for one in found if one.places]


def _key(group: Group) -> tuple[object, ...]:
    return tuple((sample.input_ids, sample.trained, sample.soft) for sample in group)


def _stem(group: Group) -> tuple[int, ...]:
    """What all samples of a group begin with."""
    first, last = min(group, key=_ids).input_ids, max(group, key=_ids).input_ids
    return first[: common_length(first, last)]


def _alone(group: Group) -> int:
    ordered = sorted(sample.input_ids for sample in group)
    return sum(map(len, ordered)) - sum(_saved(a, b) for a, b in pairwise(ordered))


def _saved(first: Sequence[int], second: Sequence[int]) -> int:
    return max(0, common_length(first, second) - MIN_SHARED + 1)


def _ids(sample: Sample) -> tuple[int, ...]:
    return sample.input_ids
