"""One decoded row, in any accepted form, becomes a conversation.

Accepted are OpenAI messages (`messages`), ShareGPT (`conversations`, also with tool turns) and
Alpaca (`instruction`, `input`, `output`, with `system` and `history`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.data.findings import RowError
from tunesmith.data.json_rows import parse
from tunesmith.data.messages import Conversation, Identity, Message, Place, Role
from tunesmith.language import t

Form = Literal["messages", "sharegpt", "alpaca"]

_TURNS: dict[str, Form] = {"messages": "messages", "conversations": "sharegpt"}
_QUESTIONS = ("instruction", "prompt", "query")
_ANSWERS = ("output", "response", "completion")
_TURN_FIELDS = {
    "role",
    "from",
    "content",
    "value",
    "name",
    "tool_calls",
    "tool_call_id",
    "function_call",
}
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
_CALL_ROLES = {"function_call", "tool_call"}
_DEEPEST = 64


@dataclass(frozen=True)
class Parsed:
    """A conversation, the field each of its messages came from, and fields nobody reads."""

    conversation: Conversation
    fields: tuple[str, ...]
    unused: tuple[str, ...]


@dataclass(frozen=True)
class _Turn:
    field: str
    message: Message


def form_of(names: Collection[str]) -> Form | None:
    """The form that a row, or a table's header, with these field names has."""
    for name, form in _TURNS.items():
        if name in names:
            return form
    return "alpaca" if any(name in names for name in (*_QUESTIONS, *_ANSWERS)) else None


def unknown_form(names: Collection[str]) -> RowError:
    """The error for field names that fit no form."""
    return RowError(
        "unknown-form",
        None,
        t("the fields {names} fit no known form.", names=", ".join(map(str, names)) or "(none)"),
        t("Use messages (OpenAI), conversations (ShareGPT), or instruction and output (Alpaca)."),
    )


def parse_row(row: object, place: Place) -> Parsed:
    """The row as a conversation.

    Raises:
        RowError: It fits no form, or a field of it is missing or of the wrong type.
    """
    if not isinstance(row, Mapping):
        raise _wrong_type(None, row, t("an object with fields"))
    form = form_of(row)
    if form is None:
        raise unknown_form(row.keys())
    turns, used, unused = _alpaca(row) if form == "alpaca" else _chat(row, form)
    turns = [*_system(row, turns), *turns]
    identity = _identity(row.get("identity"))
    used |= {"system", "tools"} | ({"identity"} if identity else set())
    return Parsed(
        Conversation(
            messages=tuple(turn.message for turn in turns),
            tools=_tools(row.get("tools")),
            place=place,
            identity=identity,
        ),
        fields=tuple(turn.field for turn in turns),
        unused=(*_unused(row, used), *sorted(unused)),
    )


def _alpaca(row: Mapping[str, Any]) -> tuple[list[_Turn], set[str], set[str]]:
    question = _first(row, _QUESTIONS)
    answer = _first(row, _ANSWERS)
    asked = [_text(row[question], question), _optional_text(row.get("input"), "input")]
    turns = _history(row.get("history"))
    turns.append(_Turn(question, Message("user", "\n".join(part for part in asked if part))))
    turns.append(_Turn(answer, Message("assistant", _text(row[answer], answer))))
    return turns, {question, answer, "input", "history"}, set()


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str:
    for name in names:
        if row.get(name) is not None:
            return name
    raise _missing(names[0])


def _history(value: object) -> list[_Turn]:
    turns: list[_Turn] = []
    for number, pair in enumerate(_list(value, "history")):
        field = f"history[{number}]"
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise _wrong_type(field, pair, t("a question and its answer"))
        turns.append(_Turn(f"{field}[0]", Message("user", _text(pair[0], f"{field}[0]"))))
        turns.append(_Turn(f"{field}[1]", Message("assistant", _text(pair[1], f"{field}[1]"))))
    return turns


def _chat(row: Mapping[str, Any], form: Form) -> tuple[list[_Turn], set[str], set[str]]:
    field = next(name for name in _TURNS if _TURNS[name] == form)
    turns: list[_Turn] = []
    unused: set[str] = set()
    for number, entry in enumerate(_list(row[field], field)):
        where = f"{field}[{number}]"
        if not isinstance(entry, Mapping):
            raise _wrong_type(where, entry, t("an object with role and content"))
        _add_turn(turns, entry, where)
        unused |= {f"{field}[].{name}" for name in _unused(entry, _TURN_FIELDS)}
    return turns, {field}, unused


def _add_turn(turns: list[_Turn], entry: Mapping[str, Any], where: str) -> None:
    role = entry.get("role") or entry.get("from")
    content = "content" if entry.get("content") is not None else "value"
    field = f"{where}.{content if content in entry else 'content'}"
    if isinstance(role, str) and role in _CALL_ROLES:
        calls = _calls(_json(_text(entry.get(content), field), field), field)
        _add_calls(turns, calls, field)
        return
    if not isinstance(role, str) or role not in _ROLES:
        raise RowError(
            "unknown-role",
            f"{where}.role" if "role" in entry else f"{where}.from",
            t("the role {role} is not known.", role=_shown(role)),
            t("Use system, user, assistant or tool."),
        )
    calls = _calls(_json(entry.get("tool_calls"), where), f"{where}.tool_calls")
    calls += _calls(entry.get("function_call"), f"{where}.function_call")
    text = "" if calls and entry.get(content) is None else _content(entry.get(content), field)
    turns.append(_Turn(field, _message(_ROLES[role], text, calls, entry, where)))


def _message(
    role: Role, text: str, calls: tuple[dict[str, Any], ...], entry: Mapping[str, Any], where: str
) -> Message:
    if calls and role != "assistant":
        raise RowError(
            "role-order",
            where,
            t("only the assistant can call a tool."),
            t("Set the role to assistant, or delete the calls."),
        )
    return Message(
        role,
        text,
        tool_calls=calls,
        name=_optional_text(entry.get("name"), f"{where}.name") or None,
        tool_call_id=_optional_text(entry.get("tool_call_id"), f"{where}.tool_call_id") or None,
    )


def _add_calls(turns: list[_Turn], calls: tuple[dict[str, Any], ...], field: str) -> None:
    """Calls belong to the assistant turn before them, as text and calls are one turn."""
    last = turns[-1] if turns else None
    if last is not None and last.message.role == "assistant":
        turns.pop()
        text, calls = last.message.content, last.message.tool_calls + calls
    else:
        text = ""
    turns.append(_Turn(field, Message("assistant", text, tool_calls=calls)))


def _calls(value: object, field: str) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    return tuple(_call(call, field) for call in (value if isinstance(value, list) else [value]))


def _call(value: object, field: str) -> dict[str, Any]:
    """OpenAI's form of a call, with the arguments as an object, as chat templates take it."""
    if not isinstance(value, Mapping):
        raise _wrong_type(field, value, t("a call with name and arguments"))
    function = value.get("function", value)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise _missing(f"{field}.name")
    arguments = _json(function.get("arguments"), f"{field}.arguments")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise _wrong_type(f"{field}.arguments", arguments, t("an object"))
    _require_shallow(arguments, f"{field}.arguments")
    call = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
    return {"id": value["id"], **call} if isinstance(value.get("id"), str) else call


def _tools(value: object) -> tuple[dict[str, Any], ...]:
    tools: list[dict[str, Any]] = []
    for number, tool in enumerate(_list(value, "tools")):
        field = f"tools[{number}]"
        if not isinstance(tool, Mapping):
            raise _wrong_type(field, tool, t("a tool with name and parameters"))
        wrapped = dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}
        if not isinstance(wrapped["function"], Mapping) or not wrapped["function"].get("name"):
            raise _missing(f"{field}.name")
        _require_shallow(wrapped, field)
        tools.append(wrapped)
    return tuple(tools)


def _system(row: Mapping[str, Any], turns: Sequence[_Turn]) -> list[_Turn]:
    system = _optional_text(row.get("system"), "system")
    if not system.strip():
        return []
    if turns and turns[0].message.role == "system":
        raise RowError(
            "role-order",
            "system",
            t("the row has two system prompts."),
            t("Keep the field system, or the system message, not both."),
        )
    return [_Turn("system", Message("system", system))]


def _identity(value: object) -> Identity | None:
    if not isinstance(value, Mapping):
        return None
    name, author = value.get("name"), value.get("author")
    return Identity(name, author) if isinstance(name, str) and isinstance(author, str) else None


def _unused(row: Mapping[str, Any], used: Collection[str]) -> tuple[str, ...]:
    return tuple(
        str(name)
        for name, value in row.items()
        if name not in used and value not in (None, "", [], {})
    )


def _content(value: object, field: str) -> str:
    """The text of a message; a list of text parts, as OpenAI allows, is joined."""
    if not isinstance(value, list):
        return _text(value, field)
    texts = []
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise _wrong_type(field, part, t("text; pictures and sound cannot be trained on"))
        texts.append(_text(part.get("text"), field))
    return "".join(texts)


def _text(value: object, field: str) -> str:
    if value is None:
        raise _missing(field)
    if not isinstance(value, str):
        raise _wrong_type(field, value, t("text"))
    return value


def _optional_text(value: object, field: str) -> str:
    return "" if value is None else _text(value, field)


def _list(value: object, field: str) -> list[Any]:
    decoded = _json(value, field)
    if decoded is None:
        return []
    if not isinstance(decoded, list):
        raise _wrong_type(field, decoded, t("a list"))
    return decoded


def _json(value: object, field: str) -> Any:
    """Tables and some datasets keep lists and objects as JSON text."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return parse(value)
    except RowError as error:
        raise RowError(error.kind, field, error.problem, error.fix) from None


def _require_shallow(value: object, field: str) -> None:
    level: list[object] = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for item in level
            if isinstance(item, Mapping | list)
            for inner in (item.values() if isinstance(item, Mapping) else item)
        ]
        if not level:
            return
    raise RowError(
        "wrong-type",
        field,
        t("it is nested more than {most} levels deep.", most=_DEEPEST),
        t("Write it more simply, or delete the row."),
    )


def _missing(field: str) -> RowError:
    return RowError(
        "missing-field", field, t("the field is missing."), t("Add it, or delete the row.")
    )


def _wrong_type(field: str | None, value: object, expected: str) -> RowError:
    return RowError(
        "wrong-type",
        field,
        t("{found} stands where {expected} belongs.", found=_shown(value), expected=expected),
        t("Correct it, or delete the row."),
    )


def _shown(value: object) -> str:
    if value is None:
        return t("nothing")
    if isinstance(value, Mapping):
        return t("an object")
    if isinstance(value, list | tuple):
        return t("a list")
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"
