"""Begin a training and watch it. The training is a process of its own; this only reads its run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import streamlit as st

from tunesmith import runs
from tunesmith.apps.figures import a_pass, duration, size
from tunesmith.apps.studio import trainer
from tunesmith.apps.studio.data_page import files
from tunesmith.apps.studio.live import live
from tunesmith.apps.studio.loss_chart import loss_chart
from tunesmith.apps.studio.parts import sentences
from tunesmith.apps.studio.settings_form import settings_form
from tunesmith.config import TrainSettings
from tunesmith.language import t
from tunesmith.models.store import installed
from tunesmith.runs import Run

LAST_LINES = 40  # of the log


def page() -> None:
    """Draw the page."""
    st.header(t("Train"))
    models, data = [model.name for model in installed()], files()
    if not models:
        st.info(t("A model comes first: get one on the models page."))
    elif not data:
        st.info(t("Data comes first: write some on the data page."))
    else:
        with st.expander(t("A new training"), icon=":material/add:", expanded=not _names()):
            _new(models, data)
    names = _names()
    if names:
        chosen = st.selectbox(t("Run"), names, key="run")
        _watch(Path(chosen))


def _new(models: list[str], data: list[str]) -> None:
    left, right = st.columns(2)
    model = left.selectbox(t("Model"), models, key="train-model")
    chosen = right.multiselect(t("Data"), data, default=data[:1], key="train-data")
    values = settings_form()
    with sentences():
        settings = TrainSettings(model=model, data=tuple(map(Path, chosen)), **values)
        with st.container(horizontal=True):
            begins = st.button(
                t("Begin"), type="primary", icon=":material/play_arrow:", disabled=not chosen
            )
            plans = st.button(t("What will it take?"), disabled=not chosen, key="plan")
        if plans:
            st.session_state["planned"] = settings, list(_plan(settings))
        planned_for, events = st.session_state.get("planned", (None, []))
        if planned_for == settings:
            _show_plan(*events)
        if begins:
            st.session_state["run"] = str(trainer.start(settings))
            st.rerun()


def _plan(settings: TrainSettings) -> Iterator[dict[str, Any]]:
    """The plan and the forecast, told by a process that does a few steps."""
    with st.spinner(t("Doing a few steps to see what all of them take …")):
        for event in trainer.plan(settings):
            if event["event"] in ("Planned", "Forecast"):
                yield event


def _show_plan(planned: dict[str, Any], forecast: dict[str, Any]) -> None:
    figures = {
        t("time"): duration(forecast["seconds"]),
        t("memory"): size(forecast["memory"]),
        t("steps"): f"{planned['steps']:,}",
        t("tokens"): f"{planned['tokens']:,}",
    }
    for (name, figure), column in zip(figures.items(), st.columns(len(figures)), strict=True):
        column.metric(name, figure)
    st.caption(
        t(
            "{low} to {high} · {trained:,} tokens trained on · {samples:,} samples, of them "
            "{replay:,} neutral, {held_out:,} held out · learning rate {rate:g} · a pass: {a_pass}",
            low=duration(forecast["low"]),
            high=duration(forecast["high"]),
            trained=planned["trained_tokens"],
            samples=planned["samples"],
            replay=planned["replay"],
            held_out=planned["held_out"],
            rate=planned["learning_rate"],
            a_pass=a_pass(
                planned["micro_batch_tokens"],
                planned["recomputed_layers"],
                planned["recomputed_mlps"],
                planned["layers"],
            ),
        )
    )


@live
def _watch(path: Path) -> None:
    with sentences():
        run = Run(path)
        running = run.trainer is not None
        events = run.events() if path.is_dir() else []
        _state(run, events, running=running)
        _curves(run, events)
        log = trainer.log_of(path)
        if log.exists():
            with st.expander(t("Log")):
                st.code("\n".join(_lines(log)[-LAST_LINES:]) or "…", language=None)


def _state(run: Run, events: list[dict[str, Any]], *, running: bool) -> None:
    kinds = [event["event"] for event in events]
    step = next((event for event in reversed(events) if event["event"] == "Step"), None)
    if step is not None:
        speed = step["tokens"] / step["seconds"]
        st.progress(
            step["step"] / step["steps"],
            t("step {step} of {steps} · loss {loss:.3f} · {speed:.0f} tokens/s",
              step=step["step"], steps=step["steps"], loss=step["loss"], speed=speed),
        )  # fmt: skip
    if running:
        if st.button(t("Stop"), icon=":material/stop:"):
            trainer.stop(run)
    elif "Finished" in kinds:
        st.success(t("Trained. Talk to it on the chat page."))
    elif "Failed" in kinds and kinds[-1] == "Failed":
        st.error(events[-1]["reason"])
    elif run.checkpoints.is_dir() and any(run.checkpoints.iterdir()):
        st.warning(t("Stopped; it can go on from its last checkpoint."))
        if st.button(t("Go on"), icon=":material/play_arrow:"):
            trainer.resume(run)
    elif lines := _lines(trainer.log_of(run.path)):
        st.info(lines[-1])
    else:
        st.info(t("It is beginning."))


def _curves(run: Run, events: list[dict[str, Any]]) -> None:
    steps = [event for event in events if event["event"] == "Step"]
    if not steps:
        return
    loss_chart({run.name: events})
    left, right = st.columns(2)
    rates = [{t("step"): one["step"], t("learning rate"): one["learning_rate"]} for one in steps]
    speeds = [
        {t("step"): one["step"], t("tokens/s"): one["tokens"] / one["seconds"]} for one in steps
    ]
    left.line_chart(rates, x=t("step"), y=t("learning rate"), height=160)
    right.line_chart(speeds, x=t("step"), y=t("tokens/s"), height=160)


def _names() -> list[str]:
    """Runs, and trainings that are beginning; the newest first."""
    begun = {run.path for run in runs.every()}
    begun |= {log.with_suffix("") for log in Path("runs").glob("*.log")}
    return [str(path) for path in sorted(begun, key=_changed, reverse=True)]


def _changed(path: Path) -> float:
    places = (path / "config.toml", trainer.log_of(path))
    return max((place.stat().st_mtime for place in places if place.exists()), default=0.0)


def _lines(log: Path) -> list[str]:
    """What the log says, a progress line that was written over itself only as it was last."""
    if not log.exists():
        return []
    text = log.read_text("utf-8", errors="replace")
    return [line.rsplit("\r", 1)[-1] for line in text.split("\n") if line.strip()]
