"""Commands that the page begins: processes of their own, which outlive it."""

import os
import subprocess
import sys
from collections.abc import Iterable
from typing import IO

from tunesmith.language import current_language

# -P: a file of the working folder must not stand in for a library's.
_COMMAND = (
    sys.executable,
    "-P",
    "-c",
    "import sys; from tunesmith.apps.cli import main; sys.exit(main())",
)

_children: list["subprocess.Popen[bytes]"] = []  # kept until they end, then cleared away


def spawn(words: Iterable[str], out: IO[bytes]) -> int:
    """Begin a `tunesmith` command that says all it has to say in `out`; returns its process id."""
    child = subprocess.Popen(
        [*_COMMAND, "--lang", current_language(), *words],
        stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    _children[:] = [one for one in _children if one.poll() is None]
    _children.append(child)
    return child.pid
