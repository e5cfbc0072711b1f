"""Two answers with what differs marked, as HTML in which nothing of theirs acts."""

import re
from difflib import SequenceMatcher
from html import escape

# A word, but each Chinese, Japanese or Korean character alone; a run of spaces; a sign.
_PIECE = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|\s+|[^\w\s]"
)


def marked(before: str, after: str) -> tuple[str, str]:
    """Both texts as HTML: `<del>` around what only `before` says, `<ins>` of only `after`."""
    old, new = _PIECE.findall(before), _PIECE.findall(after)
    left, right = [], []
    for what, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        gone, come = escape("".join(old[a:b])), escape("".join(new[c:d]))
        left.append(gone if what == "equal" or not gone else f"<del>{gone}</del>")
        right.append(come if what == "equal" or not come else f"<ins>{come}</ins>")
    return "".join(left), "".join(right)
