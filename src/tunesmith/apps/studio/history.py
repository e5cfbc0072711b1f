"""Conversations of the page, in one SQLite file: a refresh, a second tab or a crash loses none.

Each turn is a transaction of its own, so a process that is killed leaves the last whole turn.
"""

import json
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.chat import with_system
from tunesmith.data.messages import Message, Role
from tunesmith.errors import UsageError
from tunesmith.language import t

TITLE = 40  # characters of the first question that name a conversation
WAIT = 5.0  # seconds that one tab waits for another's write

_SCHEMA = """
CREATE TABLE IF NOT EXISTS conversations (
    id TEXT PRIMARY KEY, title TEXT NOT NULL, target TEXT NOT NULL, system TEXT,
    changed REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS turns (
    conversation TEXT NOT NULL REFERENCES conversations(id) ON DELETE CASCADE,
    place INTEGER NOT NULL, role TEXT NOT NULL, content TEXT NOT NULL, details TEXT NOT NULL,
    PRIMARY KEY (conversation, place)
);
"""


@dataclass(frozen=True)
class Conversation:
    """What the list shows. `target` is the MODEL or RUN it was last held with."""

    id: str
    title: str
    target: str
    system: str | None
    changed: float


@dataclass(frozen=True)
class Turn:
    """What one side said; `details` tell how an answer went: speed, adapter, how it ended."""

    role: Role
    content: str
    details: dict[str, Any]


class History:
    """The conversations in one file, made when first written to.

    Raises:
        UsageError: (every method) The file cannot be read or written; the message says why.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def conversations(self, search: str = "") -> list[Conversation]:
        """All conversations, or those with `search` in title or text; the newest first."""
        like = "%" + search.replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_") + "%"
        query = r"""
            SELECT id, title, target, system, changed FROM conversations
            WHERE title LIKE :like ESCAPE '\' OR id IN (
                SELECT conversation FROM turns WHERE content LIKE :like ESCAPE '\')
            ORDER BY changed DESC, rowid DESC
        """
        with self._open() as db:
            return [Conversation(*row) for row in db.execute(query, {"like": like})]

    def find(self, id: str) -> Conversation | None:
        """The conversation, or None if it is not (or no longer) there."""
        query = "SELECT id, title, target, system, changed FROM conversations WHERE id = ?"
        with self._open() as db:
            row = db.execute(query, (id,)).fetchone()
        return Conversation(*row) if row else None

    def turns(self, id: str) -> list[Turn]:
        """What was said, in order."""
        query = "SELECT role, content, details FROM turns WHERE conversation = ? ORDER BY place"
        with self._open() as db:
            rows = db.execute(query, (id,)).fetchall()
        return [Turn(role, content, json.loads(details)) for role, content, details in rows]

    def begin(self, question: str, target: str, system: str | None) -> str:
        """A new conversation, named after its first question; returns its id."""
        id = uuid.uuid4().hex
        row = (id, _title(question), target, system, time.time())
        with self._open() as db:
            db.execute("INSERT INTO conversations VALUES (?, ?, ?, ?, ?)", row)
        return id

    def add(self, id: str, role: str, content: str, **details: Any) -> None:
        """Append a turn. Of a conversation that was deleted meanwhile, nothing is kept."""
        insert = """
            INSERT INTO turns SELECT id, (
                SELECT coalesce(max(place) + 1, 0) FROM turns WHERE conversation = :id
            ), :role, :content, :details FROM conversations WHERE id = :id
        """
        values = {"id": id, "role": role, "content": content, "details": json.dumps(details)}
        with self._open() as db:
            db.execute(insert, values)
            db.execute("UPDATE conversations SET changed = ? WHERE id = ?", (time.time(), id))

    def cut(self, id: str, place: int) -> None:
        """Forget the turns from `place` (from 0) on, to say them anew."""
        with self._open() as db:
            db.execute("DELETE FROM turns WHERE conversation = ? AND place >= ?", (id, place))

    def settle(self, id: str, target: str, system: str | None) -> None:
        """Note whom the conversation goes on with, and under which system prompt."""
        values = (target, system, id)
        with self._open() as db:
            db.execute("UPDATE conversations SET target = ?, system = ? WHERE id = ?", values)

    def rename(self, id: str, title: str) -> None:
        """Give it another name; an empty one changes nothing."""
        if title.strip():
            with self._open() as db:
                db.execute("UPDATE conversations SET title = ? WHERE id = ?", (title.strip(), id))

    def delete(self, id: str) -> None:
        """Forget the conversation."""
        with self._open() as db:
            db.execute("DELETE FROM conversations WHERE id = ?", (id,))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection for this call alone, so that any thread may call; commits at the end."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._path, timeout=WAIT)) as db:
                db.execute("PRAGMA foreign_keys = ON")
                db.executescript(_SCHEMA)
                with db:
                    yield db
        except (sqlite3.Error, OSError) as error:
            raise UsageError(
                t(
                    "The conversations in {path} cannot be read or written: {reason}. Free some "
                    "space, or move the file away to begin a new one.",
                    path=self._path,
                    reason=error,
                )
            ) from error


def messages(turns: list[Turn], system: str | None) -> list[Message]:
    """The turns as the model is to read them."""
    return with_system(system, [Message(turn.role, turn.content) for turn in turns])


def as_json(conversation: Conversation, turns: list[Turn]) -> str:
    """The conversation as one JSON object; its `messages` are also a training row."""
    said = [message.as_dict() for message in messages(turns, conversation.system)]
    whole = {"title": conversation.title, "target": conversation.target, "messages": said}
    return json.dumps(whole, ensure_ascii=False, indent=2) + "\n"


def as_markdown(conversation: Conversation, turns: list[Turn]) -> str:
    """The conversation for reading; what was said is quoted, so that none of it acts."""
    parts = [f"# {_quoted(conversation.title)}", f"{conversation.target}"]
    if conversation.system is not None:
        parts.append(f"**system**\n\n{_fenced(conversation.system)}")
    parts += [f"**{turn.role}**\n\n{_fenced(turn.content)}" for turn in turns]
    return "\n\n".join(parts) + "\n"


def _title(question: str) -> str:
    line = " ".join(question.split())
    return line if len(line) <= TITLE else line[: TITLE - 1] + "…"


def _quoted(line: str) -> str:
    return line.replace("<", "&lt;").replace("[", r"\[").replace("`", r"\`")


def _fenced(text: str) -> str:
    """The text as a code block that nothing in it can end."""
    longest = max((len(run) for run in _runs_of_ticks(text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _runs_of_ticks(text: str) -> list[str]:
    return "".join(letter if letter == "`" else " " for letter in text).split()
