"""Writes docs/cli.md from the help pages: `make docs`."""

from pathlib import Path

from tunesmith.apps.help import page
from tunesmith.apps.menu import COMMANDS
from tunesmith.language import set_language

WIDTH = 88


def reference() -> str:
    """The whole page: every command's `--help`, in the order of the menu."""
    set_language("en")
    parts = ["# Commands", "Made from `--help` by `make docs`; do not edit.", _fenced("")]
    for name in COMMANDS:
        parts += [f"## tunesmith {name}", _fenced(name)]
    return "\n\n".join(parts) + "\n"


def _fenced(name: str) -> str:
    return f"```text\n{page(name.split(), width=WIDTH)}\n```"


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(reference(), encoding="utf-8")
