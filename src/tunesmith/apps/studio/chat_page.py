"""Talk to a model or a run; conversations lie in the side bar."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict

import streamlit as st

from tunesmith import runs
from tunesmith.apps.studio import puller
from tunesmith.apps.studio.downloads import begin, show_downloads
from tunesmith.apps.studio.history import (
    Conversation,
    Turn,
    as_json,
    as_markdown,
    messages,
)
from tunesmith.apps.studio.inert import inert_markdown
from tunesmith.apps.studio.parts import desk, history, parties, sentences, trained_system
from tunesmith.apps.studio.sampling_form import sampling_form
from tunesmith.engines.base import Sampling
from tunesmith.language import t

PACKAGED = "smollm2-135m"  # comes as a Python package, so that it needs no hub
FACES = {"user": ":material/person:", "assistant": ":material/music_note:"}
REDRAW = 0.1  # seconds between two redraws of a growing answer
LONGEST_STOP = 10.0  # seconds; a model that is being opened cannot be stopped
OPEN = "c"  # the conversation's id in the page's address


def page() -> None:
    """Draw the page."""
    if "kept" in st.session_state:
        st.session_state["kept"].wait(LONGEST_STOP)
    with sentences():
        here = parties()
        if not here:
            _welcome()
            return
        conversation = history().find(st.query_params.get(OPEN, ""))
        _sidebar(conversation)
        target = _target(here, conversation)
        system, sampling, adapter = _settings(target, conversation)
        _talk(conversation, target, system, sampling, adapter)


def _welcome() -> None:
    """No model is here yet: offer the one that can be had anywhere."""
    st.subheader(t("A model first"))
    st.write(
        t("None is here yet. {model} is small (93 MB) and talks on any computer.", model=PACKAGED)
    )
    show_downloads()
    if all(pull.spec != PACKAGED for pull in puller.every()) and st.button(
        t("Download {model}", model=PACKAGED), type="primary"
    ):
        begin(PACKAGED)


def _sidebar(conversation: Conversation | None) -> None:
    with st.sidebar:
        if st.button(t("New conversation"), icon=":material/add:", width="stretch"):
            _go_to(None)
        search = st.text_input(
            t("Search"), placeholder=t("Search"), label_visibility="collapsed", key="search"
        )
        for one in history().conversations(search):
            current = conversation is not None and one.id == conversation.id
            name, menu = st.columns([5, 1], vertical_alignment="center")
            if name.button(one.title, key=f"open-{one.id}", width="stretch",
                           type="secondary" if current else "tertiary"):  # fmt: skip
                _go_to(one.id)
            with menu.popover(
                "", icon=":material/more_vert:", type="tertiary", key=f"menu-{one.id}"
            ):
                _menu(one, current)


def _menu(one: Conversation, current: bool) -> None:
    title = st.text_input(t("Title"), one.title, key=f"title-{one.id}")
    if title != one.title and title.strip():
        history().rename(one.id, title)
        st.rerun()
    turns = history().turns(one.id)
    for name, text in (("json", as_json(one, turns)), ("md", as_markdown(one, turns))):
        label = t("Export as {format}", format={"json": "JSON", "md": "Markdown"}[name])
        file = f"conversation-{one.id[:8]}.{name}"
        st.download_button(label, text, file, key=f"{name}-{one.id}", width="stretch")
    if st.button(t("Delete"), key=f"delete-{one.id}", icon=":material/delete:", width="stretch"):
        history().delete(one.id)
        _go_to(None if current else st.query_params.get(OPEN))


def _target(here: list[str], conversation: Conversation | None) -> str:
    last = conversation.target if conversation is not None else None
    key = f"target-{conversation.id if conversation is not None else ''}"
    place = here.index(last) if last in here else 0
    if last is not None and last not in here:
        st.info(t("{target} is gone; the conversation goes on with another.", target=last))
    return st.selectbox(t("Talking to"), here, place, key=key, label_visibility="collapsed")


def _settings(target: str, conversation: Conversation | None) -> tuple[str | None, Sampling, bool]:
    id = conversation.id if conversation is not None else ""
    with st.expander(t("Settings"), icon=":material/tune:"):
        own = conversation is not None and conversation.target == target
        system = st.text_area(
            t("System prompt"),
            (conversation.system if own and conversation else trained_system(target)) or "",
            key=f"system-{id}-{target}",
        )
        adapter = runs.is_run(target) and st.toggle(
            t("Adapter"), value=True, key="adapter", help=t("Off: the base model answers.")
        )
        sampling = sampling_form("chat")
    return system.strip() or None, sampling, adapter


def _talk(
    conversation: Conversation | None,
    target: str,
    system: str | None,
    sampling: Sampling,
    adapter: bool,
) -> None:
    turns = history().turns(conversation.id) if conversation is not None else []
    with st.chat_message("assistant", avatar=FACES["assistant"]):
        st.write(t("How can I help?"))
    for place, turn in enumerate(turns):
        _show(conversation, place, turn)
    asked = st.chat_input(t("Write a message"), key="asked")
    again = st.session_state.pop("again", None)  # a question that was changed
    if question := again or asked:
        id = conversation.id if conversation else history().begin(question, target, system)
        history().settle(id, target, system)
        history().add(id, "user", question)
        st.query_params[OPEN] = id
        _show(None, len(turns), Turn("user", question, {}))
        turns = history().turns(id)
    elif turns and turns[-1].role == "user" and st.session_state.pop("answer", False):
        assert conversation is not None
        id = conversation.id
    else:
        return
    _answer(id, turns, target, system, sampling, adapter)
    st.rerun()


def _show(conversation: Conversation | None, place: int, turn: Turn) -> None:
    with st.chat_message(turn.role, avatar=FACES[turn.role]):
        st.markdown(inert_markdown(turn.content))
        if conversation is None:
            return
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            if turn.role == "assistant":
                st.caption(_how_it_went(turn))
                if st.button("", icon=":material/refresh:", key=f"again-{place}",
                             help=t("Answer again"), type="tertiary"):  # fmt: skip
                    history().cut(conversation.id, place)
                    st.session_state["answer"] = True
                    st.rerun()
            else:
                _edit(conversation, place, turn)
            with st.popover("", icon=":material/content_copy:", help=t("Copy"), type="tertiary",
                            key=f"copy-{place}"):  # fmt: skip
                st.code(turn.content, language=None, wrap_lines=True)


def _edit(conversation: Conversation, place: int, turn: Turn) -> None:
    with st.popover("", icon=":material/edit:", help=t("Change and send again"), type="tertiary",
                    key=f"edit-{place}"):  # fmt: skip
        text = st.text_area(t("Question"), turn.content, key=f"text-{conversation.id}-{place}")
        if st.button(t("Send again"), key=f"send-{place}", type="primary") and text.strip():
            history().cut(conversation.id, place)
            st.session_state["again"] = text
            st.rerun()


def _answer(
    id: str,
    turns: list[Turn],
    target: str,
    system: str | None,
    sampling: Sampling,
    adapter: bool,
) -> None:
    """Stream the answer; whatever has come when it is stopped is kept."""
    with _until_kept(), st.chat_message("assistant", avatar=FACES["assistant"]):
        area, button = st.empty(), st.empty()
        button.button(t("Stop"), key="stop", icon=":material/stop_circle:", type="tertiary")
        with desk().turn(target) as turn:
            for ahead in turn.waiting():
                area.caption(t("Waiting; {count} before you.", count=ahead))
            area.caption("…")
            reply = turn.pipeline.complete(messages(turns, system), sampling, adapter=adapter)
            try:
                with closing(reply.ticks(REDRAW)) as ticks:
                    for _ in ticks:
                        area.markdown(inert_markdown(reply.text) or "…")
                        time.sleep(REDRAW)  # what comes meanwhile is drawn together
            finally:
                if reply.text and reply.stats is not None:
                    details = asdict(reply.stats) | {
                        "tokens_per_second": reply.stats.tokens_per_second,
                        "adapter": adapter,
                    }
                    history().add(id, "assistant", reply.text, **details)


@contextmanager
def _until_kept() -> Iterator[None]:
    """What the visitor does meanwhile ends this run of the script; the next one waits for it."""
    kept = st.session_state["kept"] = threading.Event()
    try:
        yield
    finally:
        kept.set()


def _how_it_went(turn: Turn) -> str:
    told = turn.details
    if not told:
        return ""
    text = t(
        "{speed:.0f} tokens/s · first after {first:.2f} s",
        speed=told["tokens_per_second"],
        first=told["first_token"],
    )
    ends = {
        "length": t("cut after {count} tokens", count=told["tokens"]),
        "cancelled": t("stopped"),
    }
    return " · ".join([text, *([ends[told["finish"]]] if told["finish"] in ends else [])])


def _go_to(id: str | None) -> None:
    """Open that conversation, or a new one."""
    if id is None:
        st.query_params.pop(OPEN, None)
    else:
        st.query_params[OPEN] = id
    st.rerun()
