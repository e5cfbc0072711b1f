"""Trainings that go wrong, each in a way of its own: real ones, and each must be named as it is."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers_data import load
from tunesmith.config import TrainSettings
from tunesmith.data.convert import as_row
from tunesmith.data.messages import Conversation
from tunesmith.data.packs import Sample
from tunesmith.data.render import Renderer
from tunesmith.evaluation.compare import compare
from tunesmith.evaluation.verdict import Verdict
from tunesmith.models.store import LocalModel
from tunesmith.runs import find
from tunesmith.training.train import train

pytestmark = pytest.mark.timeout(600)

ROWS = Path(__file__).parent / "golden" / "identity.jsonl"

Judged = Callable[..., Verdict]


@pytest.fixture
def judged(tmp_path: Path, smollm2: LocalModel) -> Judged:
    """Trains the packaged model without replay, quickly, and compares it."""

    def judge(rows: list[Conversation], **settings: Any) -> Verdict:
        file, out = tmp_path / "rows.jsonl", tmp_path / "run"
        lines = (json.dumps(as_row(row), ensure_ascii=False) + "\n" for row in rows)
        file.write_text("".join(lines), encoding="utf-8")
        settings = {"max_steps": 16, "eval_every": 4, "save_every": 16} | settings
        for _ in train(
            TrainSettings(model=smollm2.name, data=(file,), out=out, replay=0, probes=4, **settings)
        ):
            pass
        *_, verdict = compare(find(out), questions=4)
        assert isinstance(verdict, Verdict)
        return verdict

    return judge


def own() -> list[Conversation]:
    """A smaller set than the package's, and always the same: in so few steps all of it counts."""
    return load([ROWS])


def test_nothing_is_wrong_with_a_sound_one(judged: Judged) -> None:
    verdict = judged(own())
    assert (verdict.learning, verdict.stops, verdict.causes) == ("learnt", True, ())


def test_too_few_steps(judged: Judged) -> None:
    verdict = judged(own(), max_steps=6, eval_every=2)
    assert (verdict.learning, verdict.causes) == ("not", ("short",))


def test_thirty_times_the_rate(judged: Judged) -> None:
    verdict = judged(own(), max_steps=12, learning_rate=0.06)
    assert (verdict.learning, verdict.keeping, verdict.causes) == ("not", "damaged", ("rate",))


def test_the_end_of_answers_masked(judged: Judged, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Renderer.sample

    def sample(self: Renderer, row: Conversation) -> list[Sample]:
        return [replace(one, trained=(*one.trained[:-1], False)) for one in whole(self, row)]

    monkeypatch.setattr(Renderer, "sample", sample)
    verdict = judged(own())
    assert verdict.causes == ("endless",)


def test_one_question_two_hundred_times(judged: Judged) -> None:
    verdict = judged(own()[:1] * 200, max_steps=8)
    assert verdict.causes == ("few",)


def test_contradictory_rows(judged: Judged, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    text = ROWS.read_text(encoding="utf-8")
    other.write_text(text.replace("小铁匠", "大木匠").replace("铁匠铺", "木匠铺"), encoding="utf-8")
    verdict = judged(own() + load([other]))
    assert "contradicted" in verdict.causes


def test_shuffled_answers(judged: Judged) -> None:
    rows = own()
    answers = [row.messages[-1] for row in rows]
    random.Random(0).shuffle(answers)
    verdict = judged(
        [
            replace(row, messages=(*row.messages[:-1], answer))
            for row, answer in zip(rows, answers, strict=True)
        ]
    )
    assert (verdict.learning, verdict.causes) == ("partly", ("shuffled",))
