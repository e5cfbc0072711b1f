"""Draws events: live on a terminal, as plain lines in a pipe or a log, or as JSON lines."""

import json
import shlex
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from tunesmith.apps.figures import Speed, a_pass, duration, size
from tunesmith.apps.inert import inert
from tunesmith.language import t
from tunesmith.training.events import (
    Evaluated,
    Event,
    Failed,
    Finished,
    Planned,
    Replaying,
    Saved,
    Shrunk,
    Started,
    Step,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from tunesmith.data.preview import Span
    from tunesmith.models.hub import Chosen, PullEvent
    from tunesmith.models.store import LocalModel

PLAIN_WIDTH = 120
SECONDS_BETWEEN_LINES = 2.0


def console() -> Console:
    """A console on stdout; where that is no terminal, wide and without colour."""
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    return Console(
        width=width, highlight=False, markup=False, emoji=False, soft_wrap=width is not None
    )


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """A table of plain cells; whatever the cells hold, none is read as markup."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        drawn.add_column(Text(title), overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(inert(cell)) for cell in row))
    return drawn


def print_json(value: Any) -> None:
    """One JSON document on one line of stdout."""
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


def print_event(event: "DataclassInstance") -> None:
    """Its fields as one JSON line, its kind under `event`."""
    print_json({"event": type(event).__name__} | asdict(event))


def sample_text(spans: "Iterable[Span]", max_length: int | None, screen: Console) -> Text:
    """A sample's tokens, trained ones green and cut ones struck; without colour, ⟦trained✂cut⟧."""
    text, place, trained, cut = Text(), 0, False, False
    for span in spans:
        place += len(span.token_ids)
        if span.trained != trained and not screen.is_terminal:
            text.append("⟦" if span.trained else "⟧")
        if max_length is not None and place > max_length and not cut:
            cut = True
            text.append("" if screen.is_terminal else "✂")
        trained = span.trained
        text.append(span.text, ("bold green" if trained else "dim") + (" strike" if cut else ""))
    if trained and not screen.is_terminal:
        text.append("⟧")
    return text


def show_pull(events: "Iterable[PullEvent]") -> "LocalModel":
    """Draw a download: where from, how much, a bar, and where it lies; returns what arrived."""
    from tunesmith.models.fetch import Progress as Fetched
    from tunesmith.models.hub import Chosen, Notice, Ready

    screen = console()
    counter: Counter | None = None
    meter = Speed()
    try:
        for event in events:
            match event:
                case Notice():
                    screen.print(event.text)
                case Chosen():
                    screen.print(_chosen(event))
                case Fetched():
                    counter = counter or Counter(screen, t("download"), event.total)
                    counter.show(event.done, meter.figures(event.done, event.total))
                case Ready():
                    model = event.model
                    screen.print(t("{name} is here: {path}", name=model.name, path=model.path))
                    return model
    finally:
        if counter is not None:
            counter.close()
    raise AssertionError("a pull ends with Ready or an error")


def print_pull(events: "Iterable[PullEvent]") -> "LocalModel":
    """Each event as one JSON line, progress once a second; returns what arrived."""
    from tunesmith.models.fetch import Progress as Fetched
    from tunesmith.models.hub import Ready

    next_line = 0.0
    for event in events:
        if isinstance(event, Fetched):
            if (now := time.monotonic()) < next_line:
                continue
            next_line = now + 1
        print_event(event)
        if isinstance(event, Ready):
            return event.model
    raise AssertionError("a pull ends with Ready or an error")


def _chosen(event: "Chosen") -> str:
    return t(
        "{repo} from {source}, revision {revision}: {size}, licence {licence}",
        repo=event.repo,
        source=event.source,
        revision=event.revision[:12],
        size=size(event.total_bytes),
        licence=event.licence,
    )


class TrainingJson:
    """Each event as one JSON line, its kind under `event`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def show(self, event: Event) -> None:
        """Print one event."""
        print_event(event)


class Counter:
    """Progress of one thing: a bar that moves on a terminal, a line now and then elsewhere."""

    def __init__(self, screen: Console, title: str, total: int) -> None:
        self._screen = screen
        self._title = title
        self._total = total
        self._next_line = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            console=screen,
            disable=not screen.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, figures="")
        self._bar.start()

    def show(self, done: int, figures: str) -> None:
        """Move to `done` of the total; `figures` stands beside the bar."""
        self._bar.update(self._task, completed=done, figures=figures)
        now = time.monotonic()
        if not self._screen.is_terminal and (now >= self._next_line or done == self._total):
            self._next_line = now + SECONDS_BETWEEN_LINES
            self._screen.print(f"{self._title}  {figures}")

    def close(self) -> None:
        """Leave the bar as it stands; twice does no harm."""
        self._bar.stop()


class TrainingTerminal:
    """A plan, a bar that moves with every step, and a line for whatever is worth keeping."""

    def __init__(self) -> None:
        self._console = console()
        self._counter: Counter | None = None
        self._speeds: deque[tuple[int, float]] = deque(maxlen=20)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def show(self, event: Event) -> None:
        """Draw one event."""
        match event:
            case Replaying():
                self._count(t("base model's answers"), event.done, event.total)
                if event.done == event.total:
                    self._close()
            case Planned():
                self._close()
                self._console.print(_plan(event))
            case Started():
                for line in _started(event):
                    self._console.print(line)
            case Step():
                self._speeds.append((event.tokens, event.seconds))
                self._count(t("training"), event.step, event.steps, _figures(event, self._speeds))
            case Evaluated():
                self._console.print(_evaluated(event))
            case Shrunk():
                self._console.print(_shrunk(event))
            case Finished():
                self._close()
                self._console.print(_finished(event))
            case Failed():
                self._close()
                if event.checkpoint is not None:
                    self._console.print(_how_to_go_on(event.checkpoint))
            case Saved():
                pass

    def _count(self, title: str, done: int, total: int, figures: str = "") -> None:
        if self._counter is None:
            self._counter = Counter(self._console, title, total)
        self._counter.show(done, f"{done}/{total}  {figures}".rstrip())

    def _close(self) -> None:
        if self._counter is not None:
            self._counter.close()
            self._counter = None


def _plan(event: Planned) -> Table:
    cut = t(", {cut} samples cut at --max-length", cut=event.cut) if event.cut else ""
    dropped = t(", {n} dropped: nothing to train on", n=event.dropped) if event.dropped else ""
    rows = [
        (
            t("samples"),
            t("{all:,}, of them {replay:,} neutral", all=event.samples, replay=event.replay)
            + dropped,
        ),
        (t("held out"), f"{event.held_out:,}"),
        (
            t("tokens"),
            t("{all:,}, {trained:,} trained on", all=event.tokens, trained=event.trained_tokens)
            + cut,
        ),
        (t("steps"), f"{event.steps:,}"),
        (t("learning rate"), f"{event.learning_rate:g}"),
        (
            t("trainable"),
            t(
                "{part:,} of {whole:,} parameters ({share:.2%})",
                part=event.trainable_parameters,
                whole=event.total_parameters,
                share=event.trainable_parameters / event.total_parameters,
            ),
        ),
        (t("device"), f"{event.device}, {event.dtype}"),
        (
            t("a pass"),
            a_pass(
                event.micro_batch_tokens,
                event.recomputed_layers,
                event.recomputed_mlps,
                event.layers,
            ),
        ),
    ]
    grid = Table.grid(padding=(0, 2))
    for name, value in rows:
        grid.add_row(Text(name, style="bold"), Text(value))
    return grid


def _figures(event: Step, speeds: Iterable[tuple[int, float]]) -> str:
    pairs = list(speeds)
    seconds = sum(seconds for _, seconds in pairs) or 1e-9
    left = (event.steps - event.step) * seconds / len(pairs)
    return t(
        "loss {loss:.3f} · {speed:,.0f} tok/s · {left} left · {memory}",
        loss=event.loss,
        speed=sum(tokens for tokens, _ in pairs) / seconds,
        left=duration(left),
        memory=size(event.memory),
    )


def _evaluated(event: Evaluated) -> str:
    text = t("step {step}: held-out loss {loss:.3f}", step=event.step, loss=event.loss)
    if event.kl is not None:
        text += t(", {kl:.3f} nats a token from the base", kl=event.kl)
    return text + (t(", the best so far") if event.best else "")


def _shrunk(event: Shrunk) -> str:
    return t(
        "memory ran out; going on with {tokens:,} tokens in a pass and {layers} layers recomputed, "
        "for the same result",
        tokens=event.micro_batch_tokens,
        layers=event.recomputed_layers,
    )


def _started(event: Started) -> Iterator[str]:
    for notice in event.notices:
        yield t("note: {notice}", notice=inert(notice))
    if event.resumed_from:
        yield t("resumed after step {step}", step=event.resumed_from)


def _finished(event: Finished) -> str:
    if event.stopped_early:
        return t(
            "stopped early, for the held-out loss no longer fell; the best adapter: {path}",
            path=event.adapter,
        )
    return t("trained; the adapter: {path}", path=event.adapter)


def _how_to_go_on(checkpoint: Path) -> str:
    run = shlex.quote(str(checkpoint.parent.parent))
    return t("to go on from the last checkpoint: tunesmith train --resume {run}", run=run)
