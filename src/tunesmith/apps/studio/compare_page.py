"""Base beside tuned, or any two: one prompt, or many questions and the verdict."""

import time
from contextlib import closing
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import streamlit as st

from tunesmith import runs
from tunesmith.apps.comparison import MARKS, verdict_lines
from tunesmith.apps.differences import marked
from tunesmith.apps.report_command import keep_comparison
from tunesmith.apps.studio.data_page import files
from tunesmith.apps.studio.parts import desk, parties, sentences, trained_system
from tunesmith.apps.studio.sampling_form import sampling_form
from tunesmith.chat import with_system
from tunesmith.data.messages import Message
from tunesmith.engines.base import Sampling
from tunesmith.evaluation.compare import (
    Compared,
    Question,
    ask_both,
    from_file,
    from_texts,
    held_out,
)
from tunesmith.evaluation.verdict import Verdict
from tunesmith.language import t

REDRAW = 0.1  # seconds between two redraws of a growing answer
STYLE = """<style>
.answer { white-space: pre-wrap; overflow-wrap: anywhere; }
.pairs { width: 100%; border-collapse: collapse; table-layout: fixed; font-size: .9rem; }
.pairs td, .pairs th { border-bottom: 1px solid #8884; padding: .4rem; vertical-align: top;
  text-align: left; overflow-wrap: anywhere; white-space: pre-wrap; }
.pairs small { opacity: .6; }
del { background: #d9534f33; text-decoration: none; }
ins { background: #2fa36b44; text-decoration: none; }
</style>"""


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: a MODEL or RUN, and whether its adapter is on."""

    target: str
    adapter: bool

    @property
    def label(self) -> str:
        """What the page calls it."""
        if not runs.is_run(self.target):
            return self.target
        state = t("tuned") if self.adapter else t("base")
        return f"{self.target} · {state}"


def page() -> None:
    """Draw the page."""
    st.header(t("Compare"))
    with sentences():
        here = parties()
        if not here:
            st.info(t("A model comes first: get one on the models page."))
            return
        one, many = st.tabs([t("One prompt"), t("Many questions")])
        with one, sentences():
            _one(here)
        with many, sentences():
            _many([name for name in here if runs.is_run(name)])


def _one(here: list[str]) -> None:
    sides = {side.label: side for name in here for side in _sides(name)}
    left, right = st.columns(2)
    first = sides[left.selectbox(t("Left"), [*sides], min(1, len(sides) - 1), key="compare-left")]
    second = sides[right.selectbox(t("Right"), [*sides], key="compare-right")]
    with st.expander(t("Settings"), icon=":material/tune:"):
        system = st.text_area(
            t("System prompt"),
            trained_system(second.target) or "",
            key=f"compare-system-{second.target}",
        )
        sampling = sampling_form("compare", temperature=0.0)
    with st.form("compare-prompt", border=False):
        prompt = st.text_area(t("Question"), key="compare-question")
        asked = st.form_submit_button(t("Ask both"), type="primary")
    columns = st.columns(2)
    if asked and prompt.strip():
        messages = with_system(system.strip() or None, [Message("user", prompt)])
        said = []
        for side, column in zip((first, second), columns, strict=True):
            column.caption(side.label)
            area = column.empty()
            said.append((area, _stream(side, messages, sampling, area)))
        for (area, _), text in zip(said, marked(said[0][1], said[1][1]), strict=True):
            area.html(STYLE + f'<div class="answer">{text}</div>')


def _sides(name: str) -> list[Side]:
    return [Side(name, True), Side(name, False)] if runs.is_run(name) else [Side(name, False)]


def _stream(side: Side, messages: list[Message], sampling: Sampling, area: Any) -> str:
    with desk().turn(side.target) as turn:
        for ahead in turn.waiting():
            area.caption(t("Waiting; {count} before you.", count=ahead))
        reply = turn.pipeline.complete(messages, sampling, adapter=side.adapter)
        with closing(reply.ticks(REDRAW)) as ticks:
            for _ in ticks:
                area.html(STYLE + f'<div class="answer">{escape(reply.text) or "…"}</div>')
                time.sleep(REDRAW)
        return reply.text


def _many(here: list[str]) -> None:
    if not here:
        st.info(t("A finished training comes first: begin one on the training page."))
        return
    name = st.selectbox(t("Run"), here, key="compare-run")
    held, own = t("Held-out questions of this run"), t("Questions of my own")
    source = st.selectbox(t("Questions"), [held, own, *files()], key="compare-source")
    texts = st.text_area(t("One a line"), key="compare-texts") if source == own else ""
    begun = st.button(t("Ask base and tuned"), type="primary", key="compare-ask")
    area = st.container()
    done: dict[str, list[Compared | Verdict]] = st.session_state.setdefault("compared", {})
    if begun:
        done.pop(name, None)
        run = runs.find(name)
        if source == held:
            questions = held_out(run)
        elif source == own:
            questions = from_texts(texts.splitlines(), run)
        else:
            questions = from_file(Path(source), run)
        done[name] = _ask(name, questions, area)
    if name in done:
        _show(done[name], area)
    if begun and source == held:
        area.caption(t("report: {path}", path=keep_comparison(run, done[name])))


def _ask(name: str, questions: list[Question], area: Any) -> list[Compared | Verdict]:
    """Ask them all, drawing each pair as it comes; leaving the page, or Stop, ends it."""
    bar, table, stop = area.empty(), area.empty(), area.empty()
    stop.button(t("Stop"), icon=":material/stop:", key="compare-stop")
    done: list[Compared | Verdict] = []
    with desk().turn(name) as turn:
        for ahead in turn.waiting():
            bar.caption(t("Waiting; {count} before you.", count=ahead))
        bar.progress(0.0, t("asking the model without and with what it learnt …"))
        with closing(ask_both(runs.find(name), turn.pipeline, questions)) as results:
            for item in results:
                done.append(item)
                if isinstance(item, Compared):
                    bar.progress(len(done) / len(questions), f"{len(done)}/{len(questions)}")
                    table.html(_table([one for one in done if isinstance(one, Compared)]))
    for drawn in (bar, table, stop):
        drawn.empty()
    return done


def _show(results: list[Compared | Verdict], area: Any) -> None:
    pairs = [item for item in results if isinstance(item, Compared)]
    for verdict in (item for item in results if isinstance(item, Verdict)):
        tell = area.success if verdict.passed or not verdict.learnt.total else area.warning
        tell("  \n".join(verdict_lines(verdict)) or t("There was nothing to judge."))
    area.html(_table(pairs))


def _table(pairs: list[Compared]) -> str:
    titles = (t("question"), t("base"), t("tuned"))
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    return STYLE + (
        f'<table class="pairs"><tr>{head}<th style="width:1.5rem"></th></tr>'
        + "".join(map(_row, pairs))
        + "</table>"
    )


def _row(pair: Compared) -> str:
    base, tuned = marked(pair.base.text, pair.tuned.text)
    note = t("with the system prompt") if pair.question.has_system else ""
    right = pair.learnt if pair.learnt is not None else pair.kept
    question = f"{escape(pair.question.text)}<br><small>{escape(note)}</small>"
    cells = "".join(f"<td>{cell}</td>" for cell in (question, base, tuned, MARKS[right]))
    return f"<tr>{cells}</tr>"
