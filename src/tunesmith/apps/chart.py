"""Curves as shapes of an inline SVG; the page's style sheet gives them their colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.apps.plot import Points, thinned

WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 8, 24
TICKS = 5


@dataclass(frozen=True)
class Line:
    """A curve: its label, its points, and whether each point is marked."""

    label: str
    points: Points
    dotted: bool = False


@dataclass(frozen=True)
class Shape:
    """A line as pixels: `points` for a polyline, `dots` as centres."""

    label: str
    points: str
    dots: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """Shapes in a box of WIDTH by HEIGHT, and the ticks: where, and what stands there."""

    shapes: tuple[Shape, ...]
    across: tuple[tuple[float, str], ...]
    upright: tuple[tuple[float, str], ...]


def chart(lines: Sequence[Line]) -> Chart | None:
    """The lines in one box whose floor is 0; None if no point can be drawn."""
    clean = [(line, _drawable(line.points)) for line in lines]
    every = [point for _, points in clean for point in points]
    if not every:
        return None
    across = _ticks(max(step for step, _ in every), whole=True)
    upright = _ticks(max(value for _, value in every))

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + step / across[-1] * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - value / upright[-1] * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    shapes = []
    for line, points in clean:
        placed = [place(step, value) for step, value in points]
        path = " ".join(f"{x},{y}" for x, y in placed)
        shapes.append(Shape(line.label, path, tuple(placed) if line.dotted else ()))
    return Chart(
        shapes=tuple(shapes),
        across=tuple((place(tick, 0)[0], f"{tick:,g}") for tick in across),
        upright=tuple((place(0, tick)[1], f"{tick:g}") for tick in upright),
    )


def _drawable(points: Points) -> Sequence[tuple[int, float]]:
    return thinned([(step, value) for step, value in points if math.isfinite(value)])


def _ticks(highest: float, *, whole: bool = False) -> list[float]:
    """Round numbers from 0 to the first that is not below `highest`, about TICKS of them."""
    rough = highest / TICKS or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    width = next(power * part for part in (1, 2, 5, 10) if power * part >= rough)
    width = max(width, 1.0) if whole else width
    return [width * number for number in range(max(1, math.ceil(highest / width)) + 1)]
