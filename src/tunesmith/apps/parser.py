"""One command's line as cyclopts parses it: flags come from the signature of its function."""

from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import BoundArguments
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cyclopts.exceptions as kinds
from cyclopts import App, CycloptsError, Parameter, Token

from tunesmith import runs
from tunesmith.apps.menu import COMMANDS
from tunesmith.config import flag, read_recipe
from tunesmith.errors import UsageError
from tunesmith.language import t

if TYPE_CHECKING:
    from cyclopts.argument import Argument, ArgumentCollection

RECIPE = "RECIPE"  # the name cyclopts gives the positional argument of `train` and `plan`


def run_command(name: str, words: Sequence[str]) -> int:
    """Call the command with the words that follow its name; the exit code it returned.

    Raises:
        UsageError: The words do not fit the command.
    """
    bound = parse(name, words)
    return int(_function(name)(*bound.args, **bound.kwargs) or 0)


def parse(name: str, words: Sequence[str]) -> BoundArguments:
    """The words as the command's arguments; a recipe among them is read.

    Raises:
        UsageError: The words do not fit the command; the sentence says which and how.
    """
    try:
        _, bound, _ = _app(name).parse_args(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        hint = t("`tunesmith {command} --help` shows what it takes.", command=name)
        raise UsageError(f"{_explain(error)} {hint}") from error
    return bound


def arguments_of(name: str) -> "ArgumentCollection":
    """What can be typed after the command's name."""
    return _app(name).assemble_argument_collection().filter_by(show=True)


def _app(name: str) -> App:
    return App(
        name=f"tunesmith {name}",
        default_command=_function(name),
        help_flags=(),
        version_flags=(),
        default_parameter=Parameter(negative_iterable=(), consume_multiple=True),
        config=_use_recipe if name in ("train", "plan") else None,
    )


def _function(name: str) -> Callable[..., int | None]:
    module, _, function = COMMANDS[name].function.partition(":")
    command: Callable[..., int | None] = getattr(import_module(module), function)
    return command


def _explain(error: CycloptsError) -> str:
    """The parser's complaint as one sentence in the reader's language."""
    sentences: dict[type[CycloptsError], Callable[[Any], str]] = {
        kinds.UnknownOptionError: _unknown_option,
        kinds.CoercionError: _wrong_value,
        kinds.MissingArgumentError: _missing,
        kinds.RepeatArgumentError: _repeated,
        kinds.UnusedCliTokensError: _too_many,
    }
    return sentences.get(type(error), _in_english)(error)


def _unknown_option(error: Any) -> str:
    from difflib import get_close_matches

    option = error.token.keyword or error.token.value
    known = [name for argument in error.argument_collection for name in argument.names]
    close = get_close_matches(option, known, n=1)
    if close:
        return t("there is no {option}; did you mean {close}?", option=option, close=close[0])
    return t("there is no {option}.", option=option)


def _wrong_value(error: Any) -> str:
    flag = error.token.keyword if error.token and error.token.keyword else _name(error.argument)
    choices = error.argument.get_choices() if error.argument else None
    if choices:
        wanted = t("one of {choices}", choices=", ".join(choices))
    elif error.target_type in (int, float):
        wanted = t("a whole number") if error.target_type is int else t("a number")
    else:
        return _in_english(error)
    return t(
        "{flag} must be {wanted}, not {value!r}.", flag=flag, wanted=wanted, value=error.token.value
    )


def _missing(error: Any) -> str:
    if error.keyword is None:
        return t("{flag} is missing.", flag=_name(error.argument))
    return t("{flag} needs a value.", flag=error.keyword)


def _repeated(error: Any) -> str:
    return t("{flag} is given twice.", flag=error.token.keyword)


def _too_many(error: Any) -> str:
    return t("do not know what to do with {words!r}.", words=" ".join(error.unused_tokens or ()))


def _in_english(error: CycloptsError) -> str:
    return " ".join(str(error).split())


def _name(argument: "Argument") -> str:
    return argument.name.upper() if argument.index is not None else argument.name


def _use_recipe(app: App, commands: tuple[str, ...], arguments: "ArgumentCollection") -> None:
    """Let a recipe, or the run that is resumed, give the settings that no flag gives."""
    given = {argument.name: argument.tokens[0].value for argument in arguments if argument.tokens}
    resume = "--resume" in given
    sources = [given[RECIPE]] if RECIPE in given else []
    if resume and "--out" in given:
        sources.append(str(runs.find(given["--out"]).path))
    by_key = {argument.keys: argument for argument in arguments}
    for source in sources:
        for key, value in _settings_in(source, resume).items():
            argument = by_key[(key,)]
            if resume and key == "out":
                argument.tokens.clear()  # a name under runs/ becomes the run's path
            if not argument.tokens:
                argument.append(Token(keyword=flag(key), source=source, implicit_value=value))


def _settings_in(source: str, resume: bool) -> dict[str, Any]:
    """A recipe's settings, or a run's: with its folder to resume it, without to begin another."""
    if not runs.is_run(source):
        return read_recipe(Path(source))
    run = runs.find(source)
    values = read_recipe(run.path / "config.toml")
    values.pop("out", None)
    return values | {"out": run.path} if resume else values
