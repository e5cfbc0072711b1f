"""Markdown from a model must not act on the page it is shown in: no image is fetched.

Raw HTML and script links are escaped by Streamlit itself.
"""

import re

_APART = "!\N{ZERO WIDTH SPACE}["  # reads the same, and is no image
_MARKS = re.compile(r"[!-/:-@\[-`{-~]")  # ASCII punctuation, all of which a backslash disarms


def inert_markdown(text: str) -> str:
    """The text with its images turned into links; code without images stays as it is."""
    # An image is ![…](…), ![…][…], or ![…] with its address elsewhere, as […]: …
    return text.replace("![", _APART) if any(end in text for end in ("](", "][", "]:")) else text


def plain(text: str) -> str:
    """The text as Markdown that reads as just that text: no link, emphasis, formula or icon."""
    return _MARKS.sub(r"\\\g<0>", " ".join(text.split()))
