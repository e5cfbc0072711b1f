"""What a comparison amounts to, at its thresholds, and what a run's own story adds to it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunesmith.data.messages import Message
from tunesmith.evaluation.compare import Answer, Compared, Question, verdict
from tunesmith.evaluation.verdict import FAR, STILL, Course, Share, Verdict
from tunesmith.runs import Run
from tunesmith.training.events import Evaluated, Finished

GOOD = Verdict(Share(10, 10), Share(20, 20), Share(20, 20), similarity=0.9, kl=0.01, agreement=0.97)


def test_a_good_run_passes() -> None:
    assert (GOOD.learning, GOOD.keeping, GOOD.stops, GOOD.passed) == ("learnt", "kept", True, True)


@pytest.mark.parametrize(
    ("changed", "learning", "keeping", "stops"),
    [
        ({"learnt": Share(9, 10)}, "learnt", "kept", True),
        ({"learnt": Share(8, 10)}, "partly", "kept", True),
        ({"learnt": Share(2, 10)}, "not", "kept", True),
        ({"kept": Share(19, 20)}, "learnt", "drifted", True),
        ({"kept": Share(15, 20)}, "learnt", "damaged", True),
        ({"kl": STILL}, "learnt", "kept", True),
        ({"kl": STILL * 1.01}, "learnt", "drifted", True),
        ({"kl": FAR * 1.01}, "learnt", "damaged", True),
        ({"kl": None, "agreement": None}, "learnt", "kept", True),
        ({"ended": Share(17, 20)}, "learnt", "kept", False),
    ],
)
def test_each_word_has_its_threshold(
    changed: dict[str, Any], learning: str, keeping: str, stops: bool
) -> None:
    found = replace(GOOD, **changed)
    assert (found.learning, found.keeping, found.stops) == (learning, keeping, stops)
    assert found.passed == ((learning, keeping, stops) == ("learnt", "kept", True))


def test_how_far_the_kept_adapter_moved_is_what_training_saw_of_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write_data({})
    assert verdict([], run).kl is None
    for step, best, kl in ((0, False, 0.0), (10, True, 0.02), (20, False, 0.3)):
        run.record(Evaluated(step, 1.0, best, kl, 1 - kl))
    found = verdict([], run)
    assert (found.loss, found.kl, found.agreement) == (1.0, 0.02, 0.98)


def test_a_run_that_did_not_look_tells_nothing_of_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write_data({})
    run.record(Evaluated(10, 1.0, best=True))
    found = verdict([], run)
    assert (found.kl, found.course, found.causes) == (None, None, ())


COURSE = Course(100, 50, contradicted=0, endless=0, losses=(3.0, 1.0, 0.5, 0.4), fit=0.3)
NOT = {"learnt": Share(1, 10)}


@pytest.mark.parametrize(
    ("course", "outcome", "causes"),
    [
        ({}, {}, ()),
        ({}, NOT, ("short",)),
        ({"losses": (3.0, 1.0, 0.4, 0.41)}, NOT, ()),
        ({"questions": 10}, {}, ()),
        ({"questions": 9, "losses": (), "fit": None}, NOT, ("few",)),
        ({"contradicted": 10}, {}, ()),
        ({"contradicted": 11, "fit": 0.0}, NOT, ("contradicted",)),
        ({"fit": 0.05}, {}, ()),
        ({"fit": 0.04}, {}, ("shuffled",)),
        ({"fit": 0.04, "losses": (3.0, 3.0)}, NOT, ()),
        ({"endless": 10}, {}, ()),
        ({"endless": 11}, {}, ("endless",)),
        ({"losses": (3.0, 9.0, 4.0), "fit": 0.0}, NOT | {"kl": 2.0}, ("rate",)),
        ({"losses": (3.0, 9.0, 1.0)}, {}, ()),
        ({"losses": (3.0, 1.0, 1.2)}, {}, ("overfit",)),
        ({"losses": (3.0, 1.0, 1.1)}, {}, ()),
    ],
)
def test_each_cause_has_its_threshold(
    course: dict[str, Any], outcome: dict[str, Any], causes: tuple[str, ...]
) -> None:
    found = replace(GOOD, course=replace(COURSE, **course), **outcome)
    assert found.causes == causes
    assert found.passed == (not outcome and "shuffled" not in causes)


def test_what_a_run_recorded_is_where_causes_are_looked_for(tmp_path: Path) -> None:
    run = Run(tmp_path)
    counts = {"samples": 8, "questions": 12, "contradicted": 2, "endless": 1}
    run.write_data(counts | {"identity": None})
    for step, loss in ((0, 2.0), (4, 1.0)):
        run.record(Evaluated(step, loss, best=step > 0))
    run.record(Finished(4, run.adapter, 1.0, stopped_early=False, fit=0.25))
    assert verdict([], run).course == Course(**counts, losses=(2.0, 1.0), fit=0.25)


ROWS = replace(
    GOOD, learnt=Share(6, 10), loss=0.4, likeness=(0.2, 0.3), course=replace(COURSE, losses=(3.0,))
)


@pytest.mark.parametrize(
    ("losses", "loss", "learning"),
    [
        ((2.0, 1.8, 1.7), 1.7, "learnt"),
        ((2.0, 1.9), 1.9, "learnt"),
        ((2.0, 1.95, 1.97), 1.95, "partly"),
        ((2.0, 2.0), 2.0, "not"),
        ((2.0, 2.3), 2.3, "not"),
    ],
)
def test_of_rows_without_an_identity_the_held_out_loss_tells(
    losses: tuple[float, ...], loss: float, learning: str
) -> None:
    found = replace(ROWS, loss=loss, course=replace(COURSE, losses=losses))
    assert found.learning == learning
    assert found.gained == pytest.approx(losses[0] - loss)


def test_answers_tell_where_no_loss_was_seen() -> None:
    assert replace(ROWS, loss=None).learning == "partly"
    assert replace(ROWS, likeness=None, learnt=Share(10, 10)).learning == "learnt"


def held_out_pair(tuned: str, *, ended: bool, reference: str = "It is four.") -> Compared:
    asked = Question("held_out", tuned, (Message("user", "2 + 2?"),), reference)
    return Compared(asked, Answer("It is", True), Answer(tuned, ended), True, None)


def test_answers_are_held_against_those_of_the_rows(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write_data({})
    long = "so " * 200
    pairs = [
        held_out_pair("It is four.", ended=True),
        held_out_pair("five", ended=False),
        held_out_pair(long, ended=False, reference=long),  # no good answer has ended by then
    ]
    found = verdict(pairs, run)
    assert found.likeness == pytest.approx(((0.8 + 0.8) / 3, (1 + 0 + 1) / 3))
    assert (found.ended, found.looping) == (Share(1, 2), 0)


def test_an_answer_that_does_not_end_may_go_in_circles(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write_data({})
    pairs = [
        held_out_pair("It is so, so it is so, so it is so, so it is so, so it is.", ended=False),
        held_out_pair("It is so, so it is so, so it is so, so it is so, so it is.", ended=True),
        held_out_pair("One may say this, that, and very much besides", ended=False),
    ]
    assert verdict(pairs, run).looping == 1
