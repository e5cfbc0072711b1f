"""The page's one model: shared side by side, swapped in turn, opened anew after a crash."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import psutil
import pytest

from tests.helpers_chat import saying
from tests.tiny_models import tiny_gguf
from tunesmith.apps.studio.desk import Desk
from tunesmith.chat import open_chat
from tunesmith.data.messages import Message
from tunesmith.errors import EngineError, ModelError

SAYINGS = {"one": "abcdefgh", "two": "123456789"}


@pytest.fixture
def models(tmp_path: Path, home: Path) -> dict[str, str]:
    """Two models, each of which says one thing: what it says, to where it is."""
    return {
        text: str(tiny_gguf(saying(tmp_path / name, text), tmp_path / f"{name}.gguf"))
        for name, text in SAYINGS.items()
    }


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk(open_chat)
    yield desk
    desk.close()


def ask(desk: Desk, target: str) -> str:
    with desk.turn(target) as turn:
        for _ in turn.waiting():
            pass
        return "".join(turn.pipeline.complete([Message("user", "?")]))


def test_ten_visitors_get_whole_answers_of_the_models_they_asked(
    desk: Desk, models: dict[str, str]
) -> None:
    texts = [*models] * 5
    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(lambda text: ask(desk, models[text]), texts)) == texts


def test_who_waits_is_told_how_many_come_first(desk: Desk, models: dict[str, str]) -> None:
    one, two = models.values()
    begun, end = Event(), Event()

    def sit() -> None:
        with desk.turn(one) as turn:
            assert list(turn.waiting()) == []
            begun.set()
            assert end.wait(60)

    with ThreadPoolExecutor(1) as pool:
        sitting = pool.submit(sit)
        assert begun.wait(60)
        with desk.turn(two) as turn, desk.turn(two) as later:
            places, after = turn.waiting(), later.waiting()
            assert [next(places), next(after)] == [1, 2]
            end.set()
            sitting.result()
            assert set(places) <= {0, 1}
            assert list(after) == []  # beside the first, in the same model


def test_who_goes_away_is_not_waited_for(desk: Desk, models: dict[str, str]) -> None:
    one, two = models.values()
    with desk.turn(one) as turn:
        assert list(turn.waiting()) == []
        with desk.turn(two):
            pass
        with desk.turn(one) as beside:
            assert list(beside.waiting()) == []


def test_a_model_that_does_not_open_blocks_nobody(
    desk: Desk, models: dict[str, str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(50))
    with pytest.raises(ModelError):
        ask(desk, str(broken))
    assert ask(desk, models["abcdefgh"]) == "abcdefgh"


def test_a_killed_engine_is_opened_anew(desk: Desk, models: dict[str, str]) -> None:
    target = models["abcdefgh"]
    assert ask(desk, target) == "abcdefgh"
    for child in psutil.Process().children():
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(EngineError):
        ask(desk, target)
    assert ask(desk, target) == "abcdefgh"
