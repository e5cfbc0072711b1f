"""How answers are drawn: the widgets that the chat and the compare page share."""

import streamlit as st

from tunesmith.engines.base import MOST_SEED, MOST_TEMPERATURE, Sampling
from tunesmith.language import t


def sampling_form(page: str, *, temperature: float = 0.7) -> Sampling:
    """Draw a widget for each number; `page` keeps one page's apart from another's."""
    left, right = st.columns(2)
    return Sampling(
        temperature=left.slider(
            t("Temperature"), 0.0, MOST_TEMPERATURE, temperature, 0.05, key=f"{page}-temperature"
        ),
        top_p=right.slider("top-p", 0.0, 1.0, 0.9, 0.05, key=f"{page}-top-p"),
        max_tokens=left.slider(t("Most new tokens"), 1, 4096, 512, key=f"{page}-max-tokens"),
        seed=int(right.number_input(t("Seed"), 0, MOST_SEED, 42, key=f"{page}-seed")),
    )
