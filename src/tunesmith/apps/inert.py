"""Text from a model or a file must not drive the terminal it is shown in."""

import re

# Control characters drive a terminal; the last ones turn around the text that follows them.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def inert(text: str) -> str:
    """The text with every character that could drive a terminal made visible as �."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
