"""Whether answers belong to their questions: does the model expect one after its own question more
than after another one?

A model that was taught shuffled answers says the right words to everything, and the loss on rows
that are shuffled alike does not tell. Seen on held-out rows, whose pairs it cannot know by heart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.data.packs import Sample

ROWS = 12  # are looked at
OTHERS = 4  # questions of other rows that each answer is put behind
ANSWER = 32  # tokens of an answer


@dataclass(frozen=True)
class Pairings:
    """First answers behind their own questions, and behind others'."""

    own: tuple[Sample, ...]
    others: tuple[Sample, ...]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Pairings":
        """Of rows from all over: neighbours may be of a kind, and any answer then fits any of them.

        Those whose answer all others give, too, tell nothing.
        """
        chosen = _spread(len(samples), min(ROWS, len(samples)))
        halves = [_halves(samples[place]) for place in chosen]
        own: list[Sample] = []
        others: list[Sample] = []
        for asked, answer in halves:
            foreign = [prompt for prompt, other in halves if other != answer and prompt != asked]
            if foreign:
                own.append(_joined(asked, answer))
                others += [
                    _joined(foreign[place], answer) for place in _spread(len(foreign), OTHERS)
                ]
        return cls(tuple(own), tuple(others))


def _spread(total: int, count: int) -> list[int]:
    """So many places of `total`, evenly far apart; some more than once where there are fewer."""
    return [number * total // count for number in range(count)]


def _halves(sample: Sample) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is asked first, and the beginning of the answer."""
    start = sample.trained.index(True)
    end = start
    while end < min(len(sample.trained), start + ANSWER) and sample.trained[end]:
        end += 1
    return sample.input_ids[:start], sample.input_ids[start:end]


def _joined(asked: tuple[int, ...], answer: tuple[int, ...]) -> Sample:
    return Sample((*asked, *answer), (False,) * len(asked) + (True,) * len(answer))
