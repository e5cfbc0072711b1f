"""The one model that all visitors of the page share, and the queue before it.

Answers of the same model run side by side, as many as the engine decodes together. Another model
is opened when the answers under way have ended; who came first is served first.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tunesmith.chat import AT_ONCE, Chat, Pipeline
from tunesmith.errors import EngineError

PATIENCE = 0.2  # seconds between two looks at the queue


class Desk:
    """Opens models with `open_chat`, one at a time, and hands out turns with the open one."""

    def __init__(self, open_chat: Callable[[str], Chat]) -> None:
        self._open_chat = open_chat
        self._changed = threading.Condition()
        self._queue: list[Turn] = []
        self._talking = 0
        self._target: str | None = None
        self._chat: Chat | None = None

    @contextmanager
    def turn(self, target: str) -> Iterator["Turn"]:
        """Stand in the queue; wait with `Turn.waiting`, then talk with `Turn.pipeline`.

        Raises:
            TunesmithError: (while waiting) The model does not open.
        """
        turn = Turn(self, target)
        with self._changed:
            self._queue.append(turn)
        try:
            yield turn
        except EngineError:
            self._drop(turn)  # it may be dead; the next one opens it anew
            raise
        finally:
            self._leave(turn)

    def close(self) -> None:
        """Free the open model."""
        with self._changed:
            self._shut()

    def ahead_of(self, turn: "Turn") -> int | None:
        """How many answers come before this turn; None once it has begun. Waits a moment."""
        with self._changed:
            if self._may_begin(turn):
                self._begin(turn)
                return None
            ahead = self._queue.index(turn) + self._talking
            self._changed.wait(PATIENCE)
            return ahead

    def _may_begin(self, turn: "Turn") -> bool:
        if self._queue[0] is not turn:
            return False
        return self._talking < AT_ONCE if self._target == turn.target else self._talking == 0

    def _begin(self, turn: "Turn") -> None:
        if self._target != turn.target:
            self._shut()
            self._chat = self._open_chat(turn.target)
            self._target = turn.target
        turn.chat = self._chat
        self._queue.remove(turn)
        self._talking += 1
        self._changed.notify_all()

    def _leave(self, turn: "Turn") -> None:
        with self._changed:
            if turn in self._queue:
                self._queue.remove(turn)
            elif turn.chat is not None:
                self._talking -= 1
            self._changed.notify_all()

    def _drop(self, turn: "Turn") -> None:
        with self._changed:
            if turn.chat is self._chat:
                self._shut()

    def _shut(self) -> None:
        if self._chat is not None:
            self._chat.close()
        self._chat = self._target = None


class Turn:
    """One visitor's place in the queue, then at the desk."""

    def __init__(self, desk: Desk, target: str) -> None:
        self.target = target
        self.chat: Chat | None = None
        self._desk = desk

    def waiting(self) -> Iterator[int]:
        """Yield how many answers come first, again and again, until it is this turn's time."""
        while (ahead := self._desk.ahead_of(self)) is not None:
            yield ahead

    @property
    def pipeline(self) -> Pipeline:
        """What answers; only after `waiting` has ended."""
        assert self.chat is not None
        return self.chat.pipeline
