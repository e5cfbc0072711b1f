"""Commands that the page begins: processes of their own."""

import os
import subprocess
import sys
from collections.abc import Generator, Iterable
from tempfile import TemporaryFile
from typing import IO

from tunesmith.errors import RunError
from tunesmith.language import current_language

# -P: a file of the working folder must not stand in for a library's. The signal is set because a
# page begun in the background hands down that Ctrl-C is ignored, by which its children are stopped.
_COMMAND = (
    sys.executable,
    "-P",
    "-c",
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from tunesmith.apps.cli import main; sys.exit(main())",
)

_children: list["subprocess.Popen[bytes]"] = []  # kept until they end, then cleared away


def spawn(words: Iterable[str], out: IO[bytes]) -> int:
    """Begin a command that outlives the page and says all it has to say in `out`; its process."""
    child = _begin(words, out, out)
    _children[:] = [one for one in _children if one.poll() is None]
    _children.append(child)
    return child.pid


def listen(words: Iterable[str]) -> Generator[str, None, None]:
    """The lines that a command prints, as they come. It is ended when nobody listens any more.

    Raises:
        RunError: It failed; the message is its own.
    """
    with TemporaryFile() as errors:
        child = _begin(words, subprocess.PIPE, errors)
        assert child.stdout is not None
        try:
            for line in child.stdout:
                yield line.decode()
            code = child.wait()
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        if code:
            errors.seek(0)
            *_, last = errors.read().decode("utf-8", "replace").strip().splitlines() or [""]
            raise RunError(last.removeprefix("tunesmith: "))


def _begin(words: Iterable[str], out: int | IO[bytes], err: IO[bytes]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [*_COMMAND, "--lang", current_language(), *words],
        stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
