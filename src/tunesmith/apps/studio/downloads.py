"""Draws the downloads that are under way; whoever opens the page finds them."""

from pathlib import Path

import streamlit as st

from tunesmith.apps.figures import Speed
from tunesmith.apps.studio import puller
from tunesmith.apps.studio.confirm import confirmed
from tunesmith.apps.studio.inert import plain
from tunesmith.apps.studio.live import live
from tunesmith.apps.studio.parts import sentences
from tunesmith.apps.studio.puller import Pull
from tunesmith.language import t


def begin(spec: str) -> None:
    """Begin to pull a model, and draw the page anew."""
    with sentences():
        puller.start(spec)
        st.rerun()


def show_downloads() -> None:
    """Draw each download: a bar while it runs, later why it ended without its model."""
    for pull in puller.every():
        with st.container(border=True):
            if pull.state == "running":
                _watch(pull.log)
            else:
                _ended(pull)


@live
def _watch(log: Path) -> None:
    pull = puller.read(log)
    if pull is None or pull.state != "running":
        st.rerun()
    st.markdown(f"**{plain(pull.spec)}**")
    st.progress(min(1.0, pull.done / pull.total) if pull.total else 0.0, _figures(pull))
    if pull.said:
        st.caption(plain(pull.said))
    if st.button(t("Stop"), icon=":material/stop:", key=f"stop-{log.stem}",
                 disabled=pull.cancelled):  # fmt: skip
        puller.cancel(pull)
        st.rerun()


def _figures(pull: Pull) -> str:
    if pull.cancelled:
        return t("It is ending.")
    if not pull.total:
        return t("Looking for it …")
    if pull.done >= pull.total:
        return t("All of it has come; it is being checked and made ready.")
    meter: Speed = st.session_state.setdefault(f"speed-{pull.log.stem}-{pull.pid}", Speed())
    return meter.figures(pull.done, pull.total)


def _ended(pull: Pull) -> None:
    st.markdown(f"**{plain(pull.spec)}**")
    failed = pull.state == "failed"
    if failed:
        st.error(plain(pull.said or ""), icon=":material/error:")
    else:
        st.info(t("Stopped; what has come stays here."))
    with st.container(horizontal=True):
        again = t("Try again") if failed else t("Go on")
        if st.button(again, icon=":material/play_arrow:", key=f"again-{pull.log.stem}"):
            begin(pull.spec)
        if confirmed(pull.log.stem, t("Delete what has come of it?")):
            with sentences():
                puller.discard(pull)
                st.rerun()
