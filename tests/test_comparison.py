"""A comparison as a person reads it."""

from dataclasses import replace

import pytest

from tunesmith.apps.comparison import show
from tunesmith.data.messages import Message
from tunesmith.evaluation.compare import Answer, Compared, Question
from tunesmith.evaluation.verdict import Course, Share, Verdict

GOOD = Verdict(learnt=Share(10, 10), kept=Share(20, 20), ended=Share(20, 20), similarity=0.93)


def _pair(tuned: str) -> Compared:
    question = Question(
        "identity", "你是谁？", (Message("system", "s"), Message("user", "你是谁？"))
    )
    return Compared(question, Answer("A robot.", True), Answer(tuned, True), True, None)


def _shown(capsys: pytest.CaptureFixture[str], *results: Compared | Verdict) -> str:
    show(results)
    return capsys.readouterr().out


def test_answers_stand_side_by_side_with_a_mark(capsys: pytest.CaptureFixture[str]) -> None:
    out = _shown(capsys, _pair("我是小明。"), GOOD)
    row = next(line for line in out.splitlines() if "你是谁" in line)
    assert row.index("你是谁") < row.index("A robot.") < row.index("我是小明") < row.index("✓")
    assert "with the system prompt" in out


def test_answers_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    out = _shown(capsys, _pair("\x1b]0;owned\x07[red]x[/red]"), GOOD)
    assert "\x1b" not in out
    assert "[red]x[/red]" in out


def test_a_passed_run_is_said_to_have_learnt_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    out = _shown(capsys, GOOD)
    assert "learnt: 10 of 10" in out
    assert "93% like the base" in out
    assert "moved" not in out
    assert "verdict: learnt, kept, stops." in out


@pytest.mark.parametrize(
    ("verdict", "words", "advice"),
    [
        (replace(GOOD, learnt=Share(4, 10)), "partly learnt, kept, stops", "more phrasings"),
        (replace(GOOD, learnt=Share(2, 10)), "not learnt, kept, stops", "more --epochs"),
        (replace(GOOD, kept=Share(18, 20)), "learnt, drifted, stops", "more --replay"),
        (replace(GOOD, kept=Share(15, 20)), "learnt, damaged, stops", "leaks"),
        (replace(GOOD, kl=0.3, agreement=0.9), "learnt, drifted, stops", "To keep more"),
        (replace(GOOD, kl=1.6, agreement=0.5), "learnt, damaged, stops", "To keep more"),
        (replace(GOOD, ended=Share(2, 20)), "learnt, kept, does not stop", "data preview"),
        (replace(GOOD, ended=Share(2, 20), looping=9), "learnt, kept, does not stop", "preview"),
        (replace(GOOD, ended=Share(2, 20), looping=10), "learnt, kept, does not stop", "circles"),
    ],
)
def test_a_run_that_fell_short_gets_advice(
    verdict: Verdict, words: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = " ".join(_shown(capsys, verdict).split())
    assert not verdict.passed
    assert ("moved: " in out) == (verdict.kl is not None)
    assert f"verdict: {words}." in out
    assert advice in out


def test_questions_of_ones_own_get_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    none = Share(0, 0)
    out = _shown(capsys, Verdict(learnt=none, kept=none, ended=none, similarity=1.0))
    assert "verdict" not in out


def test_what_rows_taught_is_told_by_their_loss(capsys: pytest.CaptureFixture[str]) -> None:
    course = Course(900, 900, contradicted=0, endless=0, losses=(2.5, 2.0, 1.9), fit=0.5)
    found = replace(GOOD, learnt=Share(6, 10), loss=1.9, likeness=(0.21, 0.34), course=course)
    out = " ".join(_shown(capsys, found).split())
    assert "a loss of 1.90 nats a token, the base's 2.50" in out
    assert "6 of 10 are more like those of the rows" in out
    assert "0.34, the base's 0.21" in out
    assert "verdict: learnt, kept, stops." in out
