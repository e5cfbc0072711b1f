"""What a training will take, told before it begins."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.tiny_models import tiny_model_folder
from tunesmith.config import TrainSettings
from tunesmith.data.identity import write_identity
from tunesmith.errors import DataError
from tunesmith.training.events import Evaluated, Planned, Replaying, Step
from tunesmith.training.forecast import Forecast, forecast
from tunesmith.training.replay import AT_ONCE
from tunesmith.training.train import train


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainSettings:
    monkeypatch.chdir(tmp_path)
    data = Path("me.jsonl")
    write_identity(data, "Anvil", "Smith", languages=["en"])
    return TrainSettings(
        model=str(tiny_model_folder(tmp_path / "model")), data=(data,), out=Path("run"),
        replay=0, probes=0, max_steps=5, device="cpu", dtype="float32",
    )  # fmt: skip


def told(settings: TrainSettings) -> tuple[Planned, Forecast]:
    events = list(forecast(settings))
    (planned,) = (event for event in events if isinstance(event, Planned))
    assert isinstance(events[-1], Forecast)
    return planned, events[-1]


def test_the_plan_is_that_of_the_training(settings: TrainSettings) -> None:
    planned, found = told(settings)
    assert not Path("run").exists()  # nothing is written
    events = list(train(settings))
    assert planned in events
    assert 0 < found.low <= found.seconds <= found.high
    steps = [event for event in events if isinstance(event, Step)]
    assert found.memory == pytest.approx(max(step.memory for step in steps), rel=0.1)


def test_more_steps_take_longer_and_evaluations_count(settings: TrainSettings) -> None:
    _, short = told(settings)
    _, long = told(replace(settings, max_steps=500))
    assert long.seconds > 10 * short.step_seconds
    assert long.seconds > 100 * min(short.step_seconds, long.step_seconds)
    seldom = [event for event in train(settings) if isinstance(event, Evaluated)]
    assert len(seldom) == 1 + settings.max_steps  # type: ignore[operator]


def test_what_came_before_counts_once(settings: TrainSettings) -> None:
    *_, found = forecast(settings, before=1000.0)
    assert isinstance(found, Forecast)
    assert 1000.0 < found.low <= found.seconds < 1060.0
    assert found.step_seconds < 10.0


def test_replay_is_counted_as_often_as_it_will_be_there(settings: TrainSettings) -> None:
    count = AT_ONCE + 20
    planned, _ = told(replace(settings, replay=count))
    assert planned.replay == pytest.approx(count, abs=5)


def test_the_neutral_questions_of_the_training_are_asked(
    settings: TrainSettings, home: Path
) -> None:
    *events, found = forecast(replace(settings, probes=4, holdout=0.3))
    assert isinstance(found, Forecast)
    assert [event.total for event in events if isinstance(event, Replaying)] == [4]


def test_a_pass_of_the_size_asked_for(settings: TrainSettings) -> None:
    planned, _ = told(replace(settings, micro_batch_tokens=100))
    assert planned.micro_batch_tokens == 100


def test_what_keeps_a_training_from_beginning_keeps_its_plan(settings: TrainSettings) -> None:
    Path("me.jsonl").write_text('{"messages": []}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"me\.jsonl"):
        list(forecast(settings))
