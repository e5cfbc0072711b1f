"""The `tunesmith` command: finds what was asked for, and turns errors into one line and a code."""

import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextvars import copy_context
from dataclasses import dataclass, field

from tunesmith import __version__
from tunesmith.apps.help import page
from tunesmith.apps.menu import GROUPS, find_command
from tunesmith.errors import TunesmithError, UsageError
from tunesmith.language import LANGUAGES, set_language, t

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    # A copied context: the language chosen here does not outlive the call.
    return copy_context().run(_run, arguments)


def _run(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    if not debug:
        warnings.simplefilter("ignore")  # what libraries tell developers is not for users
        for library in ("bitsandbytes", "lm_eval"):
            logging.getLogger(library).setLevel(logging.ERROR)
    try:
        code = _dispatch(GlobalOptions.take(arguments))
        sys.stdout.flush()
        return code
    except TunesmithError as error:
        return _fail(str(error), error.exit_code, debug)
    except KeyboardInterrupt as error:
        return _fail(str(error) or t("stopped."), INTERRUPTED, debug)
    except BrokenPipeError:
        # The reader has gone, as with `| head`; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001  the last line of defence: a sentence, no traceback
        return _fail(_unexpected(error), 1, debug)


@dataclass(frozen=True)
class GlobalOptions:
    """Flags that stand anywhere on the line, and the words that are left."""

    words: list[str] = field(default_factory=list)
    language: str | None = None
    help: bool = False
    version: bool = False

    @classmethod
    def take(cls, arguments: Sequence[str]) -> "GlobalOptions":
        """Pick the global flags out of a command line; what follows `--` is left alone."""
        words: list[str] = []
        found: dict[str, str | bool] = {}
        rest = iter(arguments)
        for word in rest:
            name, _, value = word.partition("=")
            if word == "--":
                words += [word, *rest]
            elif name == "--lang":
                found["language"] = _language(value or next(rest, ""))
            elif word in ("--help", "-h"):
                found["help"] = True
            elif word == "--version":
                found["version"] = True
            elif word != "--debug":
                words.append(word)
        return cls(words, **found)  # type: ignore[arg-type]


def _language(value: str) -> str:
    if value not in LANGUAGES:
        choices = ", ".join(LANGUAGES)
        raise UsageError(
            t("--lang must be one of {choices}, not {value!r}.", choices=choices, value=value)
        )
    return value


def _dispatch(options: GlobalOptions) -> int:
    if options.language:
        set_language(options.language)
    if options.version:
        print(f"tunesmith {__version__}")
        return 0
    if options.help or not options.words:
        print(page(options.words))
        return 0
    name = find_command(options.words)
    if name in GROUPS:
        print(page([name]))
        return UsageError.exit_code

    from tunesmith.apps.parser import run_command

    return run_command(name, options.words[len(name.split()) :])


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"tunesmith: {message}", file=sys.stderr)
    return code


def _unexpected(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return t(
        "unexpected error ({kind}: {reason}); the same line with --debug shows where.",
        kind=type(error).__name__,
        reason=" ".join(str(error).split()),
    )
