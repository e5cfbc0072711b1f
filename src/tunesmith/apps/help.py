"""Help pages, plain and quick: the root page needs no parser, and no page loads torch.

Why not the parser's own: it draws with rich, which doubles the time, and knows one language.
"""

import re
import shutil
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from tunesmith.apps.menu import COMMANDS, GROUPS, find_command
from tunesmith.language import t

if TYPE_CHECKING:
    from cyclopts.argument import Argument

WIDEST = 100
GAP = 2
METAVARS: dict[Any, str] = {str: "TEXT", int: "N", float: "NUMBER", Path: "FILE"}


def page(words: Sequence[str] = (), *, width: int | None = None) -> str:
    """The help of the command that `words` start with; of the whole program if there are none.

    Raises:
        UsageError: The words name no command.
    """
    columns = min(width or shutil.get_terminal_size().columns, WIDEST)
    name = find_command(words) if words else ""
    if not name:
        lines = _root_page(columns)
    elif name in COMMANDS:
        lines = _command_page(name, columns)
    else:
        lines = _group_page(name, columns)
    return "\n".join(lines)


def _root_page(columns: int) -> Iterator[str]:
    yield from wrap(t("tunesmith: from nothing to your own AI assistant."), columns)
    yield ""
    yield t("Usage: {usage}", usage="tunesmith COMMAND [OPTIONS]")
    yield ""
    yield t("Commands:")
    yield from _rows([(name, t(command.summary)) for name, command in COMMANDS.items()], columns)
    yield ""
    yield from _anywhere(columns)
    yield ""
    yield t("One command at a time: {usage}", usage="tunesmith COMMAND --help")


def _group_page(group: str, columns: int) -> Iterator[str]:
    yield from wrap(t(GROUPS[group]), columns)
    yield ""
    yield t("Usage: {usage}", usage=f"tunesmith {group} COMMAND [OPTIONS]")
    yield ""
    yield t("Commands:")
    members = {name: c for name, c in COMMANDS.items() if name.split()[0] == group}
    yield from _rows([(name, t(command.summary)) for name, command in members.items()], columns)


def _command_page(name: str, columns: int) -> Iterator[str]:
    from tunesmith.apps.parser import arguments_of

    command = COMMANDS[name]
    arguments = arguments_of(name)
    positional = [a for a in arguments if a.index is not None]
    yield from wrap(t(command.summary), columns)
    yield ""
    usage = " ".join(["tunesmith", name, *map(_usage_label, positional), "[OPTIONS]"])
    yield t("Usage: {usage}", usage=usage)
    yield t("Example: {example}", example=command.example)
    if positional:
        yield ""
        yield t("Arguments:")
        yield from _rows([(_label(a), _description(a)) for a in positional], columns)
    for title, options in _by_group([a for a in arguments if a.index is None]).items():
        yield ""
        yield title
        yield from _rows([(_label(a), _description(a)) for a in options], columns)
    yield ""
    yield from _anywhere(columns)


def _anywhere(columns: int) -> Iterator[str]:
    yield t("Anywhere on the line:")
    rows = [
        ("--help, -h", t("Show this help.")),
        ("--lang en|zh", t("Language of messages. Default: TUNESMITH_LANG, then the locale.")),
        ("--debug", t("On an error, show the traceback too.")),
        ("--version", t("Show the version.")),
    ]
    yield from _rows(rows, columns)


def _by_group(options: "list[Argument]") -> "dict[str, list[Argument]]":
    """Options under the title of their settings group; those of no group come first."""
    from dataclasses import fields

    from tunesmith.config import TrainSettings

    titles = {
        "basic": t("Basics:"),
        "data": t("Data:"),
        "lora": t("LoRA:"),
        "optimizer": t("Optimizer:"),
        "run": t("Evaluation and checkpoints:"),
        "machine": t("Machine:"),
    }
    groups = {item.name: item.metadata["group"] for item in fields(TrainSettings)}
    grouped: dict[str, list[Argument]] = {}
    for option in options:
        title = titles[groups[option.keys[0]]] if option.keys else t("Options:")
        grouped.setdefault(title, []).append(option)
    return grouped


def _usage_label(argument: "Argument") -> str:
    return _label(argument) if argument.required else f"[{_label(argument)}]"


def _label(argument: "Argument") -> str:
    if argument.index is not None:
        many = argument.field_info.kind is argument.field_info.VAR_POSITIONAL
        return argument.name.upper() + ("…" if many else "")
    negatives = set(argument.negatives)
    names = [name for name in argument.names if name not in negatives]
    metavar = argument.parameter.metavar or _metavar(argument.hint)
    return " ".join([", ".join(sorted(names, key=len, reverse=True)), metavar]).strip()


def _metavar(hint: Any) -> str:
    if hint is bool:
        return ""
    if get_origin(hint) is Literal:
        return "|".join(get_args(hint))
    if get_origin(hint) is tuple:
        return METAVARS[get_args(hint)[0]] + "…"
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    return _metavar(kinds[0]) if kinds else METAVARS[hint]


def _description(argument: "Argument") -> str:
    text = t(argument.parameter.help or "")
    default = argument.field_info.default
    if argument.required:
        return text + t(" (required)")
    if default is True:
        return text + t(" ({flag} turns it off)", flag=argument.negatives[0])
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    if default is None or default is False or default == "" or not argument.show_default:
        return text
    return text + t(" (default {value})", value=default)


def _rows(rows: Sequence[tuple[str, str]], columns: int) -> Iterator[str]:
    """Two columns; a label too long for the first stands on a line of its own."""
    first = min(max(display_width(label) for label, _ in rows), columns // 3)
    margin = " " * (GAP + first + GAP)
    for label, text in rows:
        lines = list(wrap(text, columns - len(margin))) or [""]
        if display_width(label) > first:
            yield " " * GAP + label
            yield margin + lines[0]
        else:
            padding = " " * (first - display_width(label) + GAP)
            yield (" " * GAP + label + padding + lines[0]).rstrip()
        yield from (margin + line for line in lines[1:])


def display_width(text: str) -> int:
    """Terminal columns of a text: a full-width character takes two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def wrap(text: str, columns: int) -> Iterator[str]:
    """Lines of at most `columns`; a break may stand at a space or beside a full-width character."""
    line = ""
    for piece in re.findall(
        r"\s+|[\u2e80-\u9fff\uff00-\uffef\u3000-\u303f][，。；：、）！？]*|"
        r"[^\s\u2e80-\u9fff\uff00-\uffef\u3000-\u303f]+[，。；：、）！？]*",
        text,
    ):
        if display_width(line + piece.rstrip()) > columns and line.strip():
            yield line.rstrip()
            line = ""
        line += piece if line else piece.lstrip()
    if line.strip():
        yield line.rstrip()
