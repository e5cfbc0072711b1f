"""The loss curves of a run: drawn in the terminal, and saved as pictures in the run folder."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from tunesmith import paths
from tunesmith.language import t

HEIGHT = 14
TICKS = 5
FORMATS = ("png", "svg")

MOST_POINTS = 500  # of one curve: more than a screen can show

Point = TypeVar("Point")
Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Curves:
    """Pairs of step and loss, in nats per trained token."""

    training: Points
    held_out: Points

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> Self:
        """The curves in a run's recorded events."""
        found: dict[str, list[tuple[int, float]]] = {"Step": [], "Evaluated": []}
        for event in events:
            if event["event"] in found:
                found[event["event"]].append((event["step"], event["loss"]))
        return cls(tuple(found["Step"]), tuple(found["Evaluated"]))


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS of them, evenly; the last is always kept."""
    every = -(-len(points) // MOST_POINTS) or 1
    return [*points[::-1][::every][::-1]]


def draw(curves: Curves, *, width: int) -> str:
    """The curves as text, `width` columns wide: a line for training, dots for held-out data."""
    import plotext

    figure = plotext.figure
    figure.clear()
    figure.plot_size(width, HEIGHT)
    if curves.training:
        figure.draw(_signal(curves.training, marker="hd").lines())
    if curves.held_out:
        figure.draw(_signal(curves.held_out, marker="●"))
    last = max(step for step, _ in (*curves.training, *curves.held_out))
    figure.ruler("x").lim(0, last)
    figure.ruler("x").ticks([round(last * part / TICKS) for part in range(TICKS + 1)])
    picture: str = figure.build().string(colorless=True).rstrip()
    return picture + "\n   " + t("loss by step: ▄ training, ● held out")


def save(curves: Curves, folder: Path) -> list[Path]:
    """Write `loss.png` and `loss.svg` into `folder`; the paths written."""
    from io import BytesIO

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # English on purpose: matplotlib's own font has no Chinese characters.
    for label, points, style in (
        ("training", curves.training, "-"),
        ("held out", curves.held_out, "o-"),
    ):
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per trained token)")
    axes.grid(alpha=0.3)
    axes.legend()
    written = []
    for suffix in FORMATS:
        picture = BytesIO()
        figure.savefig(picture, format=suffix)
        written.append(folder / f"loss.{suffix}")
        paths.write_atomic(written[-1], picture.getvalue())
    return written


def _signal(points: Points, *, marker: str) -> Any:
    import plotext

    steps, losses = zip(*points, strict=True)
    return plotext.figure.signal(list(steps), list(losses), marker=marker)
