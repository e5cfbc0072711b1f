"""The script Streamlit runs for every visitor: language, password, pages."""

import hmac
import os

import streamlit as st

from tunesmith.apps.studio import PASSWORD
from tunesmith.apps.studio.chat_page import page as chat_page
from tunesmith.apps.studio.compare_page import page as compare_page
from tunesmith.apps.studio.data_page import page as data_page
from tunesmith.apps.studio.models_page import page as models_page
from tunesmith.apps.studio.runs_page import page as runs_page
from tunesmith.apps.studio.train_page import page as train_page
from tunesmith.language import LANGUAGES, set_language, t

NAMES = {"en": "English", "zh": "中文"}


def main() -> None:
    """Draw what this visitor may see."""
    st.set_page_config("tunesmith", page_icon=":material/music_note:", layout="centered")
    _choose_language()
    if not _let_in():
        return
    pages = [
        st.Page(chat_page, title=t("Chat"), icon=":material/chat:", url_path="chat", default=True),
        st.Page(compare_page, title=t("Compare"), icon=":material/compare:", url_path="compare"),
        st.Page(models_page, title=t("Models"), icon=":material/deployed_code:", url_path="models"),
        st.Page(data_page, title=t("Data"), icon=":material/table_rows:", url_path="data"),
        st.Page(train_page, title=t("Train"), icon=":material/model_training:", url_path="train"),
        st.Page(runs_page, title=t("Runs"), icon=":material/history:", url_path="runs"),
    ]
    st.navigation(pages, position="top").run()


def _choose_language() -> None:
    """The one picked in the page, at first that of its address (?lang=) or of the browser."""
    first = "zh" if (st.context.locale or "").lower().startswith("zh") else "en"
    first = st.query_params.get("lang", os.environ.get("TUNESMITH_LANG") or first)
    language = st.session_state.get("language") or first
    language = language if language in LANGUAGES else "en"
    set_language(language)
    with st.sidebar:
        st.segmented_control(
            "language", LANGUAGES, default=language, format_func=NAMES.__getitem__,
            label_visibility="collapsed", key="language",
        )  # fmt: skip


def _let_in() -> bool:
    """Whether there is no password, or the visitor knows it."""
    password = os.environ.get(PASSWORD)
    if not password or st.session_state.get("let_in"):
        return True
    given = st.text_input(t("Password"), type="password")
    if given and hmac.compare_digest(given.encode(), password.encode()):
        st.session_state["let_in"] = True
        st.rerun()
    if given:
        st.error(t("That is not the password."))
    return False


main()
