"""Loss curves, drawn as text and saved as pictures."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from tunesmith.apps.plot import HEIGHT, Curves, draw, save

FALLING = Curves(
    training=tuple((step, 3.0 - step / 20) for step in range(1, 41)),
    held_out=((0, 3.2), (20, 2.1), (40, 1.4)),
)


def test_curves_come_from_the_recorded_events() -> None:
    events = [
        {"event": "Planned", "steps": 2},
        {"event": "Evaluated", "step": 0, "loss": 3.0, "best": False},
        {"event": "Step", "step": 1, "loss": 2.5},
        {"event": "Step", "step": 2, "loss": 2.0},
        {"event": "Evaluated", "step": 2, "loss": 2.2, "best": True},
    ]
    assert Curves.of(events) == Curves(((1, 2.5), (2, 2.0)), ((0, 3.0), (2, 2.2)))


@pytest.mark.parametrize("width", [40, 100])
def test_a_falling_loss_is_drawn_falling(width: int) -> None:
    lines = draw(FALLING, width=width).splitlines()
    assert all(len(line) <= width for line in lines)
    assert len(lines) <= HEIGHT + 1
    dots = [(row, line.index("●")) for row, line in enumerate(lines[:-1]) if "●" in line]
    assert len(dots) == 3
    assert dots == sorted(dots, key=lambda dot: dot[1]), "later dots stand lower"
    assert lines[-2].split() == ["0", "8", "16", "24", "32", "40"]


@pytest.mark.parametrize(
    "curves", [Curves(((1, 2.0),), ()), Curves((), ((0, 2.0),)), Curves(((1, 2.0), (2, 2.0)), ())]
)
def test_short_and_flat_curves_are_drawn(curves: Curves, tmp_path: Path) -> None:
    assert "┤" in draw(curves, width=60)
    assert all(path.stat().st_size > 1000 for path in save(curves, tmp_path))


def test_pictures_are_whole_files(tmp_path: Path) -> None:
    png, svg = save(FALLING, tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.read_bytes().endswith(b"IEND\xaeB`\x82")
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert sorted(tmp_path.iterdir()) == [png, svg]
