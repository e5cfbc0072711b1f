"""Parts of a page that draw themselves anew every second."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import streamlit as st

from tunesmith.language import current_language, set_language

P = ParamSpec("P")


def live(draw: Callable[P, None]) -> Callable[P, None]:
    """A fragment that is drawn every second in the language of the page around it."""

    @wraps(draw)
    def drawn(language: str, /, *args: P.args, **values: P.kwargs) -> None:
        set_language(language)  # a fragment's own run has not been through the page
        draw(*args, **values)

    fragment = st.fragment(drawn, run_every=1.0)

    @wraps(draw)
    def begun(*args: P.args, **values: P.kwargs) -> None:
        fragment(current_language(), *args, **values)

    return begun
