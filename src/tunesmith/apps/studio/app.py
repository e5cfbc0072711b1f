"""The script Streamlit runs for every visitor: language, password, pages."""

import hmac
import os

import streamlit as st

from tunesmith.apps.studio.chat_page import page as chat_page
from tunesmith.language import LANGUAGES, set_language, t

PASSWORD = "TUNESMITH_PASSWORD"
NAMES = {"en": "English", "zh": "中文"}


def main() -> None:
    """Draw what this visitor may see."""
    st.set_page_config("tunesmith", page_icon=":material/music_note:", layout="centered")
    _choose_language()
    if not _let_in():
        return
    pages = [
        st.Page(chat_page, title=t("Chat"), icon=":material/chat:", url_path="chat", default=True)
    ]
    st.navigation(pages).run()


def _choose_language() -> None:
    """The one picked in the page, at first the browser's; kept in the page's address."""
    first = "zh" if (st.context.locale or "").lower().startswith("zh") else "en"
    language = st.query_params.get("lang", os.environ.get("TUNESMITH_LANG") or first)
    language = language if language in LANGUAGES else "en"
    set_language(language)
    with st.sidebar:
        picked = st.segmented_control(
            "language", LANGUAGES, default=language, format_func=NAMES.__getitem__,
            label_visibility="collapsed", key="language",
        )  # fmt: skip
    if picked and picked != language:
        st.query_params["lang"] = picked
        st.rerun()


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
