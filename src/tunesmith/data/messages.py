"""The one in-memory form of a conversation. Every file format becomes this."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Message:
    """One turn. `tool_calls` holds OpenAI-style calls of an assistant turn."""

    role: Role
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None
    tool_call_id: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The OpenAI form, which chat templates take."""
        plain: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            plain["tool_calls"] = list(self.tool_calls)
        if self.name is not None:
            plain["name"] = self.name
        if self.tool_call_id is not None:
            plain["tool_call_id"] = self.tool_call_id
        return plain


@dataclass(frozen=True)
class Place:
    """Where a row stands: file and line, from 1 (a row number where there are no lines)."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Identity:
    """Who the assistant says it is; rows written by `data identity` carry it."""

    name: str
    author: str


@dataclass(frozen=True)
class Conversation:
    """A training row: messages, the tools they may call, and where it was read."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    place: Place | None = None
    identity: Identity | None = None

    @property
    def system(self) -> str | None:
        """The system prompt, if the conversation opens with one."""
        first = self.messages[0] if self.messages else None
        return first.content if first is not None and first.role == "system" else None
