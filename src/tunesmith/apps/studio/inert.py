"""Markdown from a model must not act on the page it is shown in: no image is fetched.

Raw HTML and script links are escaped by Streamlit itself.
"""

_APART = "!\N{ZERO WIDTH SPACE}["  # reads the same, and is no image


def inert_markdown(text: str) -> str:
    """The text with its images turned into links; code without images stays as it is."""
    # An image is ![…](…), ![…][…], or ![…] with its address elsewhere, as […]: …
    return text.replace("![", _APART) if any(end in text for end in ("](", "][", "]:")) else text
