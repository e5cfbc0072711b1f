"""What the pages share: the desk, the history, and errors as sentences."""

from collections.abc import Iterator
from contextlib import contextmanager

import streamlit as st

from tunesmith import paths, runs
from tunesmith.apps.studio.desk import Desk
from tunesmith.apps.studio.history import History
from tunesmith.chat import open_chat
from tunesmith.errors import TunesmithError
from tunesmith.models.adapter import read_info
from tunesmith.models.store import installed


@st.cache_resource
def desk() -> Desk:
    """The one desk of this server."""
    return Desk(open_chat)


def history() -> History:
    """The conversations, kept beside the models."""
    return History(paths.home() / "conversations.sqlite")


def parties() -> list[str]:
    """Whom one can talk to: finished runs, the newest first, then downloaded models."""
    finished = [run for run in runs.every() if run.adapter.is_dir()]
    finished.sort(key=lambda run: run.adapter.stat().st_mtime, reverse=True)
    return [*(str(run.path) for run in finished), *(model.name for model in installed())]


def trained_system(target: str) -> str | None:
    """The system prompt a run was trained with."""
    info = read_info(runs.find(target).adapter) if runs.is_run(target) else None
    return info.system if info is not None else None


@contextmanager
def sentences() -> Iterator[None]:
    """Show an error as its sentence where it happened, and let the page go on."""
    try:
        yield
    except TunesmithError as error:
        st.error(str(error), icon=":material/error:")
