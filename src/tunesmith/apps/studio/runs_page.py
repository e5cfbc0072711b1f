"""Runs: what came of each, several beside one another, notes, and the adapter to take away."""

import io
import zipfile
from pathlib import Path
from typing import Any

import streamlit as st

from tunesmith import runs
from tunesmith.apps.figures import size
from tunesmith.apps.story import Story, differences, story_of
from tunesmith.apps.studio import trainer
from tunesmith.apps.studio.confirm import confirmed
from tunesmith.apps.studio.inert import plain
from tunesmith.apps.studio.loss_chart import loss_chart
from tunesmith.apps.studio.parts import sentences
from tunesmith.errors import RunError
from tunesmith.language import t
from tunesmith.runs import Run


def page() -> None:
    """Draw the page."""
    st.header(t("Runs"))
    if freed := st.session_state.pop("freed", None):
        st.success(freed)
    with sentences():
        stories = sorted(map(story_of, runs.every()), key=lambda story: story.begun, reverse=True)
        if not stories:
            st.info(t("No run is here yet: begin one on the training page."))
            return
        _table(stories)
        chosen = _chosen(stories)
        loss_chart({story.run.name: story.events for story in chosen})
        if len(chosen) > 1:
            _differences([story for story in chosen if story.settings is not None])
        for story in chosen:
            with st.expander(plain(story.run.name), expanded=len(chosen) == 1):
                _one(story)


def _table(stories: list[Story]) -> None:
    rows = [
        {
            t("Run"): story.run.name,
            t("base"): (story.settings or {}).get("model", "?"),
            t("state"): story.state,
            t("steps"): _steps(story.last("Step")),
            t("held-out loss"): story.last("Evaluated").get("loss"),
            t("moved, nats"): story.last("Evaluated").get("kl"),
            t("begun"): story.begun,
            t("size"): size(story.run.size),
        }
        for story in stories
    ]
    columns = {
        t("held-out loss"): st.column_config.NumberColumn(format="%.3f"),
        t("moved, nats"): st.column_config.NumberColumn(
            format="%.3f", help=t("How far from the base at neutral answers, for each token.")
        ),
        t("begun"): st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm"),
    }
    st.dataframe(rows, hide_index=True, column_config=columns)


def _steps(step: dict[str, Any]) -> str:
    return f"{step['step']} / {step['steps']}" if step else ""


def _chosen(stories: list[Story]) -> list[Story]:
    """Those picked in the page, at first the newest; one that was deleted meanwhile is dropped."""
    here = {story.run.name: story for story in stories}
    picked = st.session_state.get("runs", [stories[0].run.name])
    st.session_state["runs"] = [name for name in picked if name in here]
    names = st.multiselect(t("Look at"), [*here], key="runs",
                           help=t("Several are laid over one another."))  # fmt: skip
    return [here[name] for name in names]


def _differences(stories: list[Story]) -> None:
    rows = differences({story.run.name: story.settings or {} for story in stories})
    if rows:
        st.dataframe(rows, hide_index=True)
    elif len(stories) > 1:
        st.caption(t("They have the same settings."))


def _one(story: Story) -> None:
    run = story.run
    for problem in story.problems:
        st.error(plain(problem), icon=":material/error:")
    with sentences():
        _notes(run)
        with st.container(horizontal=True):
            if run.adapter.is_dir():
                st.download_button(
                    t("Download the adapter"), lambda: zipped(run), f"{run.name}.zip",
                    "application/zip", on_click="ignore", icon=":material/download:",
                    key=f"zip-{run.name}",
                )  # fmt: skip
            if confirmed(run.name, t("Delete {name} and free {size}?",
                                     name=plain(run.name), size=size(run.size))):  # fmt: skip
                _delete(run)


def _notes(run: Run) -> None:
    kept, shown = run.notes, f"notes-shown-{run.name}"
    first = st.session_state.setdefault(shown, kept)
    text = st.text_area(t("Notes"), first, key=f"notes-{run.name}")
    if st.button(t("Save"), key=f"save-{run.name}", disabled=text == kept):
        if kept != first:
            raise RunError(
                t("The notes of {name} were changed elsewhere meanwhile; copy what you wrote, "
                  "then load the page again.", name=run.name)
            )  # fmt: skip
        run.write_notes(text)
        st.session_state[shown] = text
        st.rerun()


def zipped(run: Run) -> bytes:
    """The adapter's folder as a ZIP file, as PEFT loads it once it is unpacked."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:  # stored: weights hardly get smaller
        for file in sorted(run.adapter.iterdir()):
            if file.is_file() and not file.is_symlink():
                archive.write(file, Path(run.name) / file.name)
    return content.getvalue()


def _delete(run: Run) -> None:
    freed = runs.remove(run)
    trainer.log_of(run.path).unlink(missing_ok=True)
    st.session_state["freed"] = t(
        "{name} is removed; {size} freed.", name=plain(run.name), size=size(freed)
    )
    st.rerun()
