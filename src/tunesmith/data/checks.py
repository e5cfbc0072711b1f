"""What must not be trained on, named by file, line, field and fix."""

import json
import re
import shlex
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from tunesmith.data.findings import Finding, Kind, Severity
from tunesmith.data.forms import Parsed
from tunesmith.data.messages import Conversation, Message, Place
from tunesmith.data.sources import parsed_rows
from tunesmith.errors import DataError
from tunesmith.language import t

CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
_PLACEHOLDER = re.compile(r"\{\{\s*([A-Za-z_][\w.-]{0,39})\s*\}\}")
_IDENTITY_PLACEHOLDERS = {"name", "author"}
_CONTROL_TOKEN = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"
)
_SHOWN_IN_ERROR = 3


@dataclass(frozen=True)
class Report:
    """What a check found: rows seen, rows that can be trained on, and every finding."""

    rows: int
    usable: int
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings whose rows are not trained on."""
        return tuple(finding for finding in self.findings if finding.is_error)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings whose rows are trained on all the same."""
        return tuple(finding for finding in self.findings if not finding.is_error)


@dataclass
class Checker:
    """Examines conversations one after another; remembers hashes of the earlier ones."""

    held_out: dict[bytes, Place | None] = field(default_factory=dict)
    _seen: dict[bytes, Place | None] = field(default_factory=dict)
    _answers: dict[bytes, tuple[bytes, Place | None]] = field(default_factory=dict)

    def examine(
        self, conversation: Conversation, fields: Sequence[str] | None = None
    ) -> Iterator[Finding]:
        """Everything wrong with the conversation; `fields` names where its messages came from."""
        yield from examine_alone(conversation, fields, self.held_out)
        yield from self._against_others(conversation, _place(conversation))

    def _against_others(self, conversation: Conversation, place: Place) -> Iterator[Finding]:
        prompt, answer = _prompt_and_answer(conversation)
        whole = prompt + answer
        first_answer, first_place = self._answers.setdefault(prompt, (answer, place))
        if whole in self._seen:
            yield _duplicate(place, self._seen[whole])
        elif first_answer != answer:
            yield _contradiction(place, first_place)
        self._seen.setdefault(whole, place)


def examine_alone(
    conversation: Conversation,
    fields: Sequence[str] | None,
    held_out: Mapping[bytes, Place | None],
) -> Iterator[Finding]:
    """What is wrong with the conversation, whatever other rows say: every error is here."""
    place = _place(conversation)
    if fields is None:
        fields = [f"messages[{number}].content" for number in range(len(conversation.messages))]
    yield from _order(conversation.messages, fields, place)
    for message, name in zip(conversation.messages, fields, strict=True):
        yield from _text(message, name, place)
    if held_out and (question := question_key(conversation)) in held_out:
        yield _leak(place, held_out[question])


class Errors:
    """The errors of many rows: how many rows have one, and the first few."""

    def __init__(self) -> None:
        self._places: set[Place] = set()
        self._first: list[Finding] = []

    def __bool__(self) -> bool:
        return bool(self._first)

    def add(self, found: Iterable[Finding]) -> None:
        """Take note of those that are errors."""
        for error in found:
            if error.is_error:
                self._places.add(error.place)
                if len(self._first) < _SHOWN_IN_ERROR:
                    self._first.append(error)

    def require_none(self, files: Sequence[Path]) -> None:
        """Refuse the files if there was an error; nothing is left out silently.

        Raises:
            DataError: How many rows have one, and the first of them.
        """
        if self:
            raise DataError(
                t(
                    "Rows that cannot be trained on: {count}. {shown} "
                    "Type `tunesmith data check {files}` to see them all, "
                    "or `tunesmith data convert {files} -o clean.jsonl` to keep the good ones.",
                    count=len(self._places),
                    shown=" ".join(map(str, self._first)),
                    files=" ".join(shlex.quote(str(file)) for file in files),
                )
            )


def scan(
    files: Sequence[Path], held_out: Sequence[Path] = ()
) -> Iterator[tuple[Conversation | None, tuple[Finding, ...]]]:
    """Each row of `files`: its conversation (None when unreadable) and its findings.

    The questions of the `held_out` files must not stand in `files`; their own rows are not
    examined here.
    """
    checker = Checker(held_out=questions(held_out))
    for item in parsed_rows(files):
        if isinstance(item, Parsed):
            yield item.conversation, tuple(checker.examine(item.conversation, item.fields))
        else:
            yield None, (item,)


def check(files: Sequence[Path], held_out: Sequence[Path] = ()) -> Report:
    """Every finding in the files, the held-out ones after the others."""
    reports = [_report(scan(files, held_out))]
    if held_out:
        reports.append(_report(scan(held_out)))
    return Report(
        rows=sum(report.rows for report in reports),
        usable=sum(report.usable for report in reports),
        findings=tuple(finding for report in reports for finding in report.findings),
    )


def question_key(conversation: Conversation) -> bytes:
    """The same for two conversations that ask the same, whatever the system prompt or the case."""
    asked = [
        " ".join(unicodedata.normalize("NFKC", message.content).casefold().split())
        for message in _before_last_answer(conversation)
        if message.role != "system"
    ]
    return _digest(json.dumps(asked))


def _report(rows: Iterator[tuple[Conversation | None, tuple[Finding, ...]]]) -> Report:
    findings: list[Finding] = []
    broken: set[Place] = set()
    readable = usable = 0
    for conversation, found in rows:
        findings += found
        has_error = any(finding.is_error for finding in found)
        if conversation is not None:
            readable += 1
            usable += not has_error
        elif has_error:
            broken |= {finding.place for finding in found}
    return Report(readable + len(broken), usable, tuple(findings))


def questions(files: Sequence[Path]) -> dict[bytes, Place | None]:
    """What the rows of the files ask, as `question_key` has it, and where it is asked first.

    Raises:
        UsageError: A file cannot be opened.
    """
    keys: dict[bytes, Place | None] = {}
    for item in parsed_rows(files):
        if isinstance(item, Parsed):
            keys.setdefault(question_key(item.conversation), item.conversation.place)
    return keys


def _place(conversation: Conversation) -> Place:
    return conversation.place or Place(Path("-"), 1)


def _order(messages: Sequence[Message], fields: Sequence[str], place: Place) -> Iterator[Finding]:
    """The first turn that stands where it cannot."""
    if not any(message.role == "assistant" for message in messages):
        yield _finding(
            "no-answer", place, None, t("there is no assistant turn."), t("Add the answer.")
        )
        return
    before: Message | None = None
    for message, name in zip(messages, fields, strict=True):
        if message.role not in _may_follow(before):
            yield _misplaced(message, before, name, place)
            return
        before = message
    if before is not None and before.role != "assistant":
        yield _finding(
            "role-order",
            place,
            fields[-1],
            t("the last turn is {role}, so nothing answers it.", role=before.role),
            t("Delete it, or add the assistant's answer."),
        )


def _may_follow(before: Message | None) -> set[str]:
    if before is None:
        return {"system", "user"}
    if before.role == "assistant":
        return {"tool"} if before.tool_calls else {"user"}
    return {"system": {"user"}, "user": {"assistant"}, "tool": {"tool", "assistant"}}[before.role]


def _misplaced(message: Message, before: Message | None, name: str, place: Place) -> Finding:
    if before is None:
        problem = t("the first turn is {role}.", role=message.role)
        fix = t("Begin with a system or a user turn.")
    elif message.role == "system":
        problem = t("a system turn stands after a {before} turn.", before=before.role)
        fix = t("Keep one system turn, at the beginning.")
    elif message.role == "tool":
        problem = t("a tool answers, but no assistant turn before it calls a tool.")
        fix = t("Add the call, or delete the tool turn.")
    elif before.tool_calls:
        problem = t("a tool was called, but a {role} turn follows.", role=message.role)
        fix = t("Add the tool's answer after the call.")
    else:
        problem = t("a {role} turn follows a {before} turn.", role=message.role, before=before.role)
        fix = t("Let user and assistant take turns; join turns of one speaker.")
    return _finding("role-order", place, name, problem, fix)


def _text(message: Message, name: str, place: Place) -> Iterator[Finding]:
    content = message.content
    if not content.strip() and not message.tool_calls and message.role != "tool":
        yield _empty(message, name, place)
    placeholders = _PLACEHOLDER.findall(_CODE.sub("", content))
    if placeholders:
        yield _placeholder(placeholders, name, place)
    if token := _CONTROL_TOKEN.search(content):
        yield _finding(
            "control-token",
            place,
            name,
            t("the text holds {token}; it is trained on as plain text.", token=token[0]),
            t("Delete it if a chat template put it there."),
            "warning",
        )
    if character := CONTROL_CHARACTER.search(content):
        yield _finding(
            "control-character",
            place,
            name,
            t("the text holds the control character {code}.", code=f"U+{ord(character[0]):04X}"),
            t("Delete it."),
            "warning",
        )


def _empty(message: Message, name: str, place: Place) -> Finding:
    if message.role == "assistant":
        return _finding(
            "empty", place, name, t("the answer is empty."), t("Write it, or delete the row.")
        )
    return _finding(
        "empty",
        place,
        name,
        t("the {role} turn is empty.", role=message.role),
        t("Write it, or delete it."),
        "warning" if message.role == "system" else "error",
    )


def _placeholder(names: Sequence[str], field_name: str, place: Place) -> Finding:
    marked = ", ".join(dict.fromkeys("{{" + name + "}}" for name in names))
    known = any(name.casefold() in _IDENTITY_PLACEHOLDERS for name in names)
    return _finding(
        "placeholder",
        place,
        field_name,
        t("{placeholders} is not filled in.", placeholders=marked),
        t("Put the real text in its place; a model learns to say it as it stands."),
        "error" if known else "warning",
    )


def _duplicate(place: Place, first: Place | None) -> Finding:
    return _finding(
        "duplicate",
        place,
        None,
        t("the row is the same as {first}.", first=first),
        t("Delete it, unless you want it to count twice; `tunesmith data convert` leaves it out."),
        "warning",
    )


def _contradiction(place: Place, first: Place | None) -> Finding:
    return _finding(
        "contradiction",
        place,
        None,
        t("it asks the same as {first} and answers differently.", first=first),
        t("Keep one answer, unless you want both."),
        "warning",
    )


def _leak(place: Place, held_out: Place | None) -> Finding:
    return _finding(
        "leak",
        place,
        None,
        t("it asks the same as the held-out row {held_out}.", held_out=held_out),
        t("Delete one of the two, or evaluation only measures memory."),
    )


def _finding(
    kind: Kind,
    place: Place,
    name: str | None,
    problem: str,
    fix: str,
    severity: Severity = "error",
) -> Finding:
    return Finding(kind, place, name, problem, fix, severity)


def _prompt_and_answer(conversation: Conversation) -> tuple[bytes, bytes]:
    prompt = _before_last_answer(conversation)
    rest = conversation.messages[len(prompt) :]
    return _digest(_canonical(conversation, prompt)), _digest(_canonical(conversation, rest))


def _before_last_answer(conversation: Conversation) -> tuple[Message, ...]:
    messages = conversation.messages
    last = max((n for n, message in enumerate(messages) if message.role == "assistant"), default=0)
    return messages[:last]


def _canonical(conversation: Conversation, messages: Sequence[Message]) -> str:
    plain = [message.as_dict() for message in messages]
    return json.dumps([plain, conversation.tools], sort_keys=True)


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()
