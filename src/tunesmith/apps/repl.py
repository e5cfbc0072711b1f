"""Talking in the terminal: a loop for people, one answer for scripts."""

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from tunesmith.apps.inert import inert
from tunesmith.chat import Chat
from tunesmith.engines.base import Sampling
from tunesmith.errors import TunesmithError, UsageError
from tunesmith.language import t

PROMPT = "> "


def run_repl(chat: Chat, *, once: str | None = None, sampling: Sampling | None = None) -> int:
    """Talk until the user has enough; with `once`, or a pipe on stdin, answer that and end.

    Raises:
        UsageError: stdin is a pipe with nothing in it.
        EngineError: The only answer could not be given.
    """
    sampling = sampling or Sampling()
    for notice in chat.notices:
        _say(notice)
    if once is None and not sys.stdin.isatty():
        once = sys.stdin.read()
    if once is None:
        _Terminal(chat, sampling).run()
    elif question := _clean(once):
        _answer(chat, question, sampling)
    else:
        raise UsageError(t("There is no question; give one with --once, or on stdin."))
    return 0


class _Terminal:
    """Reads a line, answers it or obeys it, and again."""

    def __init__(self, chat: Chat, sampling: Sampling) -> None:
        self._chat = chat
        self._sampling = sampling
        self._ended = False

    def run(self) -> None:
        import readline  # noqa: F401  gives input() editing and history

        _say(t("Talking to {model}. /help lists the commands.", model=self._chat.model_name))
        print(t("How can I help?"))
        for line in self._lines():
            try:
                self._obey(line) if line.startswith("/") else self._ask(line)
            except TunesmithError as error:
                _say(str(error))
            if self._ended:
                break

    def _lines(self) -> Iterator[str]:
        """What the user types, until Ctrl-D, or Ctrl-C twice."""
        interrupted = False
        while True:
            try:
                line = _clean(input(PROMPT))
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                if interrupted:
                    return
                interrupted = True
                _say(t("Ctrl-C once more, or Ctrl-D, ends the conversation."))
                continue
            interrupted = False
            if line:
                yield line

    def _ask(self, line: str) -> None:
        try:
            _answer(self._chat, line, self._sampling)
        except KeyboardInterrupt:
            _say(t("Stopped."))

    def _obey(self, line: str) -> None:
        word, _, rest = line[1:].partition(" ")
        command = self._commands().get(word)
        if command is None:
            raise UsageError(t("There is no command /{word}; /help lists them.", word=word))
        command(rest.strip())

    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "help": self._help,
            "system": self._system,
            "reset": self._reset,
            "save": self._save,
            "adapter": self._adapter,
            "quit": self._quit,
        }

    def _help(self, _: str) -> None:
        for command, text in (
            ("/system", t("show the system prompt")),
            ("/system TEXT", t("set it; /system off removes it")),
            ("/reset", t("forget the conversation so far")),
            ("/save FILE", t("write the conversation to a file, as a training row")),
            ("/adapter on|off", t("answer with the adapter, or as the base model")),
            ("/quit", t("end; so does Ctrl-D. Ctrl-C stops an answer")),
        ):
            _say(f"{command:16} {text}")

    def _system(self, text: str) -> None:
        if text:
            self._chat.system = None if text == "off" else text
        _say(self._chat.system or t("No system prompt is set; the model's own default applies."))

    def _reset(self, _: str) -> None:
        self._chat.reset()
        _say(t("The conversation is forgotten."))

    def _save(self, name: str) -> None:
        if not name:
            raise UsageError(t("Name a file: /save talk.jsonl"))
        path = Path(name).expanduser()
        self._chat.save(path)
        _say(t("Saved to {path}.", path=path))

    def _adapter(self, state: str) -> None:
        if not self._chat.has_adapter:
            raise UsageError(t("No adapter is loaded; start chat with a run to have one."))
        if state not in ("on", "off"):
            raise UsageError(t("Say /adapter on or /adapter off."))
        self._chat.adapter_on = state == "on"
        _say(t("The adapter is on.") if state == "on" else t("The adapter is off."))

    def _quit(self, _: str) -> None:
        self._ended = True


def _answer(chat: Chat, question: str, sampling: Sampling) -> None:
    """Print the answer to stdout as it comes, and on stderr whether it was cut."""
    # Closed even when Ctrl-C falls between two pieces, so that the turn is kept at once.
    with closing(chat.ask(question, sampling)) as pieces:
        last = ""
        try:
            for last in pieces:
                print(inert(last), end="", flush=True)
        finally:
            print(end="\n" if last else "", flush=True)
    if chat.stats is not None and chat.stats.finish == "length":
        _say(t("The answer was cut after {count} tokens.", count=chat.stats.tokens))


def _clean(line: str) -> str:
    """What was typed or piped; bytes that are no UTF-8 become �."""
    return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()


def _say(text: str) -> None:
    """What we have to say, apart from the answers: those go to stdout."""
    print(inert(text), file=sys.stderr, flush=True)
