"""The loss curves of several runs, laid over one another."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import streamlit as st

from tunesmith.apps.plot import thinned
from tunesmith.language import t


def loss_chart(events: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draw each run's training loss faintly and its held-out loss on top; nothing without steps."""
    import altair as alt

    training = [point for run, own in events.items() for point in points(run, own, "Step")]
    held_out = [point for run, own in events.items() for point in points(run, own, "Evaluated")]
    if not training and not held_out:
        return
    x = alt.X("step:Q", title=t("step"))
    y = alt.Y("loss:Q", title=t("loss"), scale=alt.Scale(zero=False))
    legend = alt.Legend(title=None, orient="bottom", symbolOpacity=1) if len(events) > 1 else None
    colors = alt.Scale(scheme="tableau10")  # told apart even where they are faint
    color = alt.Color("run:N", legend=legend, sort=[*events], scale=colors)
    tips = ["run:N", "step:Q", alt.Tooltip("loss:Q", format=".3f")]
    faint = alt.Chart(alt.InlineData(training)).mark_line(opacity=0.3)
    clear = alt.Chart(alt.InlineData(held_out)).mark_line(point=True)
    layers = [layer.encode(x=x, y=y, color=color, tooltip=tips) for layer in (faint, clear)]
    st.altair_chart(alt.layer(*layers).properties(height=300))
    st.caption(t("Faint: training loss. With dots: held-out loss."))


def points(run: str, events: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The losses of one kind of event, thinned to what can be seen; the last is always kept."""
    found = [one for one in events if one["event"] == kind and isfinite(one["loss"])]
    return [{"run": run, "step": event["step"], "loss": event["loss"]} for event in thinned(found)]
