"""`train` and `plan`: settings from flags and recipe, events to the screen, curves to the run."""

import shlex
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from tunesmith.apps.figures import duration, size
from tunesmith.config import TrainSettings
from tunesmith.errors import UsageError
from tunesmith.language import t

if TYPE_CHECKING:
    from tunesmith.training.events import Event
    from tunesmith.training.forecast import Forecast

WIDEST_PLOT = 100

Recipe = Annotated[
    Path | None,
    Parameter(help="TOML file of settings, or a run to take them from; a flag beside it wins."),
]


def train(
    recipe: Recipe = None,
    /,
    *,
    settings: Annotated[TrainSettings | None, Parameter(name="*")] = None,
    resume: Annotated[
        bool,
        Parameter(
            help="Go on with the run, from its last checkpoint: train --resume runs/NAME",
            negative=(),
        ),
    ] = False,
    json: Annotated[bool, Parameter(help="Print each event as a JSON line.", negative=())] = False,
) -> int:
    """Fine-tune with LoRA."""
    settings = settings or TrainSettings()
    if resume and settings.out is None:
        raise UsageError(
            t("--resume needs the run to go on with: tunesmith train --resume runs/NAME")
        )

    from tunesmith.training.train import train as events_of

    return watch(events_of(settings, resume=resume), as_json=json)


def plan(
    recipe: Recipe = None,
    /,
    *,
    settings: Annotated[TrainSettings | None, Parameter(name="*")] = None,
    json: Annotated[bool, Parameter(help="Print each event as a JSON line.", negative=())] = False,
) -> None:
    """Do a few steps, and say what all of them would take."""
    import psutil

    from tunesmith.apps.terminal import TrainingTerminal, print_event
    from tunesmith.training.forecast import Forecast, forecast

    imports = time.time() - psutil.Process().create_time()
    with TrainingTerminal() as display:
        for event in forecast(settings or TrainSettings(), before=imports):
            if json:
                print_event(event)
            elif isinstance(event, Forecast):
                print(forecast_line(event))
            else:
                display.show(event)


def forecast_line(event: "Forecast") -> str:
    """Time and memory in one sentence."""
    return t(
        "about {time} ({low} to {high}), {speed:,.0f} tokens/s, {memory} of memory",
        time=duration(event.seconds),
        low=duration(event.low),
        high=duration(event.high),
        speed=event.tokens_per_second,
        memory=size(event.memory),
    )


def watch(events: "Iterable[Event]", *, as_json: bool = False) -> int:
    """Show a training's events until it ends, then its curves; the exit code.

    Raises:
        KeyboardInterrupt: The user stopped it; the message says how to go on.
    """
    from tunesmith.apps.terminal import TrainingJson, TrainingTerminal
    from tunesmith.training.events import Finished, Saved

    run: Path | None = None
    try:
        with TrainingJson() if as_json else TrainingTerminal() as display:
            for event in events:
                display.show(event)
                if isinstance(event, Saved):
                    run = event.path.parent.parent
                if isinstance(event, Finished):
                    show_curves(event.adapter.parent, on_screen=not as_json)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_stopped(run)) from None
    return 0


def show_curves(path: Path, *, on_screen: bool) -> None:
    """Save a run's loss curves in its folder, and draw them in the terminal."""
    import shutil

    from tunesmith import runs
    from tunesmith.apps import plot

    curves = plot.Curves.of(runs.find(path).events())
    pictures = plot.save(curves, path)
    if on_screen:
        print(plot.draw(curves, width=min(shutil.get_terminal_size().columns, WIDEST_PLOT)))
        print(t("curves: {paths}", paths=", ".join(map(str, pictures))))


def _stopped(run: Path | None) -> str:
    if run is None:
        return t("training was stopped before its first checkpoint; nothing is left to resume.")
    return t(
        "training was stopped; go on with: tunesmith train --resume {run}",
        run=shlex.quote(str(run)),
    )
