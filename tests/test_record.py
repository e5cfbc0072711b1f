"""A comparison that is kept in its run, and read again."""

import json
from pathlib import Path

import pytest

from tunesmith import runs
from tunesmith.config import TrainSettings
from tunesmith.data.messages import Message
from tunesmith.errors import RunError
from tunesmith.evaluation.compare import Answer, Compared, Question
from tunesmith.evaluation.record import as_json, recorded
from tunesmith.evaluation.verdict import Share, Verdict
from tunesmith.runs import Run

ASKED = Question(
    "held_out", "你是谁？", (Message("system", "s"), Message("user", "你是谁？")), "我"
)
PAIR = Compared(ASKED, Answer("A \ud83d.", True), Answer("我是小明。", False), True, None)
NEUTRAL = Compared(
    Question("neutral", "1 + 1?", (Message("user", "1 + 1?"),)),
    Answer("2", True), Answer("2", True), None, True,
)  # fmt: skip
MOVED = Verdict(Share(1, 1), Share(1, 1), Share(0, 1), 1.0, looping=1, kl=0.1, agreement=0.9)
ROWS = Verdict(Share(1, 2), Share(1, 1), Share(1, 1), 1.0, loss=0.5, likeness=(0.1, 0.25))
UNSEEN = Verdict(Share(0, 0), Share(1, 1), Share(0, 0), 1.0)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return runs.create(TrainSettings(out=tmp_path / "one"))


@pytest.mark.parametrize("verdict", [MOVED, ROWS, UNSEEN])
def test_what_is_kept_is_what_is_read(verdict: Verdict, run: Run) -> None:
    assert recorded(run) is None
    run.write_comparison(as_json([NEUTRAL, verdict]))
    assert recorded(run) == ([NEUTRAL], verdict)


def test_half_a_character_is_no_obstacle(run: Run) -> None:
    run.write_comparison(as_json([PAIR, MOVED]))
    found = recorded(run)
    assert found is not None
    assert found[0][0].base.text == "A ?."
    assert found[0][0].question == ASKED


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", "{}", '{"pairs": 1, "verdict": {}}', '{"pairs": [{}], "verdict": {}}',
        '{"pairs": [], "verdict": null}',
        json.dumps(as_json([MOVED])).replace('"count": 1', '"count": "one"'),
    ],
)  # fmt: skip
def test_what_is_damaged_is_a_sentence(content: str, run: Run) -> None:
    (run.path / "compare.json").write_text(content)
    with pytest.raises(RunError, match=r"compare\.json"):
        recorded(run)


def test_a_run_that_is_gone_is_not_made_again(run: Run) -> None:
    runs.remove(run)
    with pytest.raises(RunError, match="is gone"):
        run.write_comparison({})
    assert not run.path.exists()
