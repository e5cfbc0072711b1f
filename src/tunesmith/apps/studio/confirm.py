"""Deleting asks once more."""

import streamlit as st

from tunesmith.language import t


def confirmed(key: str, warning: str) -> bool:
    """Draw a button that opens a warning with the real one; whether that was pressed."""
    with st.popover(t("Delete"), icon=":material/delete:", type="tertiary", key=f"ask-{key}"):
        st.write(warning)
        return st.button(t("Delete"), key=f"delete-{key}", type="primary")
