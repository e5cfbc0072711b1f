"""What there is to report of a run: its story, its figures, and what a comparison found."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from tunesmith.apps.plot import Curves, Points
from tunesmith.apps.story import Story, story_of
from tunesmith.errors import RunError
from tunesmith.evaluation.compare import Compared
from tunesmith.evaluation.record import recorded
from tunesmith.evaluation.verdict import Verdict
from tunesmith.language import t
from tunesmith.runs import Run


@dataclass(frozen=True)
class Looked:
    """The held-out loss, and how far the model has moved, at one evaluation."""

    loss: float
    kl: float | None
    agreement: float | None

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> Self:
        """Of an `Evaluated` event."""
        kl, agreement = (event.get(name) for name in ("kl", "agreement"))
        return cls(
            float(event["loss"]),
            None if kl is None else float(kl),
            None if agreement is None else float(agreement),
        )


@dataclass(frozen=True)
class Figures:
    """What training recorded; `seconds` are those of its steps alone.

    `first` is the look before the first step, `best` that of the adapter that is kept.
    """

    curves: Curves
    moved: Points
    first: Looked | None
    best: Looked | None
    step: int
    steps: int
    tokens: int
    seconds: float
    memory: int

    @classmethod
    def of(cls, events: Sequence[Mapping[str, Any]]) -> Self:
        """The figures in a run's events."""
        steps = [event for event in events if event["event"] == "Step"]
        looks = [event for event in events if event["event"] == "Evaluated"]
        best = [event for event in looks if event["best"]] or looks
        return cls(
            curves=Curves.of(events),
            moved=tuple((e["step"], e["kl"]) for e in looks if e.get("kl") is not None),
            first=Looked.of(looks[0]) if looks and looks[0]["step"] == 0 else None,
            best=Looked.of(best[-1]) if best else None,
            step=int(steps[-1]["step"]) if steps else 0,
            steps=int(steps[-1]["steps"]) if steps else 0,
            tokens=sum(int(event["tokens"]) for event in steps),
            seconds=math.fsum(float(event["seconds"]) for event in steps),
            memory=max((int(event["memory"]) for event in steps), default=0),
        )


@dataclass(frozen=True)
class Facts:
    """All of a run that a report is made of."""

    run: Run
    story: Story
    settings: dict[str, Any]
    figures: Figures
    pairs: tuple[Compared, ...]
    verdict: Verdict | None


def facts_of(run: Run) -> Facts:
    """Read a run.

    Raises:
        RunError: A file of it is broken.
    """
    story = story_of(run)
    if story.problems:
        raise RunError(story.problems[0])
    try:
        figures = Figures.of(story.events)
    except (LookupError, TypeError, ValueError):
        raise RunError(t("{file} does not hold events.", file=run.metrics)) from None
    pairs, verdict = recorded(run) or ((), None)
    return Facts(run, story, story.settings or {}, figures, tuple(pairs), verdict)
