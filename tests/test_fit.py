"""Whether answers belong to their questions: real answers told from shuffled ones."""

import json
from pathlib import Path

import pytest

from tests.tiny_models import tiny_model_folder
from tunesmith.config import TrainSettings
from tunesmith.data.packs import Sample
from tunesmith.training.events import Finished
from tunesmith.training.fit import ANSWER, OTHERS, ROWS, Pairings
from tunesmith.training.train import train


def sample(asked: list[int], answer: list[int], *more: int) -> Sample:
    ids = (*asked, *answer, *more)
    return Sample(ids, (False,) * len(asked) + (True,) * len(answer) + (False,) * len(more))


def test_each_answer_stands_behind_its_own_question_and_behind_others() -> None:
    found = Pairings.of([sample([1, 2], [7, 8], 5, 5), sample([3], [9]), sample([4], [9])])
    assert found.own == (sample([1, 2], [7, 8]), sample([3], [9]), sample([4], [9]))
    assert found.others == (
        *[sample([3], [7, 8])] * (OTHERS // 2),
        *[sample([4], [7, 8])] * (OTHERS // 2),
        *[sample([1, 2], [9])] * OTHERS * 2,
    )


def test_where_all_say_the_same_there_is_nothing_to_tell() -> None:
    assert Pairings.of([sample([1], [7]), sample([2], [7])]) == Pairings((), ())
    assert Pairings.of([]) == Pairings((), ())


def test_only_the_beginnings_of_some_are_looked_at() -> None:
    found = Pairings.of([sample([n], [n] * 100) for n in range(2 * ROWS)])
    assert len(found.own) == ROWS and len(found.others) == ROWS * OTHERS
    assert {one.trained_tokens for one in (*found.own, *found.others)} == {ANSWER}


def test_rows_and_questions_are_taken_from_all_over() -> None:
    found = Pairings.of([sample([n], [n]) for n in range(2 * ROWS)])
    assert [one.input_ids[0] for one in found.own] == list(range(0, 2 * ROWS, 2))
    assert max(one.input_ids[0] for one in found.others[:OTHERS]) > ROWS


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_training_sees_it(shuffled: bool, tmp_path: Path, home: Path) -> None:
    """Half the questions are about cats, half about dogs; so are their answers, or any of them."""
    rows = [
        {"instruction": f"{animal} {number}?", "output": answer * 3}
        for number in range(40)
        for animal, other in (("cat", "dog"), ("dog", "cat"))
        for answer in [
            "miau" if (animal if not shuffled or number % 2 else other) == "cat" else "wuff"
        ]
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    settings = TrainSettings(
        model=str(tiny_model_folder(tmp_path / "model")), data=(file,), out=tmp_path / "run",
        holdout=0.2, replay=0, probes=0, max_steps=30, learning_rate=3e-2, device="cpu",
    )  # fmt: skip
    *_, last = train(settings)
    assert isinstance(last, Finished) and last.fit is not None
    assert (last.fit < 0.1) == shuffled, last.fit
