"""Models: those that are here, and those that can be had."""

import streamlit as st

from tunesmith.apps.figures import size
from tunesmith.apps.studio.confirm import confirmed
from tunesmith.apps.studio.downloads import begin, show_downloads
from tunesmith.apps.studio.inert import plain
from tunesmith.apps.studio.parts import sentences
from tunesmith.language import t
from tunesmith.models.catalog import CATALOG, Entry
from tunesmith.models.reference import SOURCE_NAMES
from tunesmith.models.store import Installed, installed, remove


def page() -> None:
    """Draw the page."""
    st.header(t("Models"))
    if freed := st.session_state.pop("freed", None):
        st.success(freed)
    show_downloads()
    here: list[Installed] = []
    with sentences():
        here = installed()
        if not here:
            st.info(t("No model is here yet; get one below."))
    for model in here:
        _card(model)
    names = {model.name for model in here}
    _get([entry for entry in CATALOG.values() if entry.name not in names])


def _card(model: Installed) -> None:
    with st.container(
        border=True, horizontal=True,
        horizontal_alignment="distribute", vertical_alignment="center",
    ):  # fmt: skip
        st.markdown(f"**{plain(model.name)}**  \n:small[:gray[{_details(model)}]]")
        if confirmed(model.name, t("Delete {name} and free {size}?",
                                   name=plain(model.name), size=size(model.size))):  # fmt: skip
            with sentences():
                freed = remove(model.name)
                st.session_state["freed"] = t(
                    "{name} is removed; {size} freed.", name=plain(model.name), size=size(freed)
                )
                st.rerun()


def _details(model: Installed) -> str:
    place = f"{SOURCE_NAMES[model.source]} {model.repo}"
    parts = (size(model.size), place, model.revision[:12], model.licence)
    return " · ".join(plain(part) for part in parts if part)


def _get(entries: list[Entry]) -> None:
    st.subheader(t("Get a model"))
    chosen = st.selectbox(t("Model"), entries, format_func=_label, key="catalog")
    if chosen is not None:
        st.caption(
            t("It takes {chat} of memory to chat and {tune} to train · licence {licence}",
              chat=size(chosen.chat_memory), tune=size(chosen.tune_memory),
              licence=chosen.licence)
        )  # fmt: skip
        if st.button(t("Download"), type="primary", icon=":material/download:", key="get"):
            begin(chosen.name)
    with st.expander(t("Another one, by its name on a hub"), icon=":material/search:"):
        _by_name()
    with st.expander(t("The whole list"), icon=":material/list:"):
        _table(entries)


def _label(entry: Entry) -> str:
    return f"{entry.name} · {size(entry.size)}"


def _by_name() -> None:
    with st.form("by-name", border=False):
        spec = st.text_input(
            "hf:owner/name, modelscope:owner/name", placeholder="hf:owner/name", key="spec"
        )
        if st.form_submit_button(t("Download"), icon=":material/download:") and spec.strip():
            begin(spec.strip())


def _table(entries: list[Entry]) -> None:
    sizes = {
        t("download"): "size",
        t("memory to chat"): "chat_memory",
        t("to train"): "tune_memory",
    }
    rows = [
        {t("to pull"): entry.name}
        | {title: getattr(entry, name) / 1e9 for title, name in sizes.items()}
        | {t("licence"): entry.licence}
        for entry in entries
    ]
    gigabytes = st.column_config.NumberColumn(format="%.1f GB")
    st.dataframe(rows, hide_index=True, column_config=dict.fromkeys(sizes, gigabytes))
