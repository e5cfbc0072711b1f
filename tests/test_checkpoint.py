"""The checkpoint that is kept: of those that learnt the most, the one that forgot the least."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from tunesmith.training.checkpoint import Progress

Look = tuple[float, float | None]


def kept(looks: Iterable[Look]) -> int:
    """The step kept after these looks, one a step from 0 on."""
    progress = Progress()
    for step, (loss, kl) in enumerate(looks):
        progress = replace(progress, step=step).having_seen(loss, kl)
    return progress.best_step


@pytest.mark.parametrize(
    ("looks", "step"),
    [
        pytest.param([(3.0, 0.0), (1.0, 0.3), (0.5, 0.2)], 2, id="the lowest loss"),
        pytest.param([(3.0, 0.0), (0.5, 0.3), (0.54, 0.1)], 2, id="nearly, and nearer the base"),
        pytest.param([(3.0, 0.0), (0.5, 0.1), (0.54, 0.105)], 2, id="as good, and settled"),
        pytest.param(
            [(3.0, 0.0), (0.5, 0.1), (0.5, 0.105), (0.5, 0.114)], 2, id="not farther by and by"
        ),
        pytest.param([(3.0, 0.0), (0.5, 0.1), (0.48, 0.3)], 1, id="hardly lower, much farther"),
        pytest.param([(3.0, 0.0), (0.5, 0.3), (0.56, 0.1)], 1, id="no longer nearly"),
        pytest.param([(3.0, 0.0), (0.6, 0.01), (0.5, 0.3)], 2, id="what is kept falls behind"),
        pytest.param([(2.0, 0.0), (1.9, 0.2), (1.92, 0.1)], 1, id="a tenth of what was gained"),
        pytest.param([(2.0, 0.0), (2.1, 0.2), (2.2, 0.1)], 1, id="nothing was gained"),
        pytest.param([(3.0, None), (0.5, None), (0.48, None)], 2, id="nobody saw how far"),
    ],
)
def test_what_has_learnt_and_kept_is_best(looks: list[Look], step: int) -> None:
    assert kept(looks) == step


def test_patience_waits_for_a_lower_loss() -> None:
    begun = replace(Progress().having_seen(3.0, 0.0), step=1).having_seen(0.5, 0.3)
    nearer = replace(begun, step=2).having_seen(0.52, 0.1)
    assert (nearer.best_step, nearer.stale) == (2, 1)
    assert replace(nearer, step=3).having_seen(0.49, 0.2).stale == 0
