"""Trainings begun from the page: they outlive it, stop, go on, and exclude one another."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest

from tests.helpers_page import settle_in, visit
from tests.tiny_models import tiny_model_folder
from tunesmith import runs
from tunesmith.apps.studio import trainer
from tunesmith.apps.studio.settings_form import CHOSEN_ELSEWHERE
from tunesmith.config import TrainSettings
from tunesmith.data.identity import write_identity
from tunesmith.errors import RunError
from tunesmith.models.store import LocalModel
from tunesmith.runs import Run
from tunesmith.training.events import Failed, Finished

OUT = Path("runs/mine")
ENDLESS = 100_000  # steps; these trainings are stopped


@pytest.fixture
def settings(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> TrainSettings:
    monkeypatch.chdir(tmp_path)
    data = Path("data/me.jsonl")
    write_identity(data, "Anvil", "Smith")
    return TrainSettings(
        model=str(tiny_model_folder(tmp_path / "model")), data=(data,), out=OUT, replay=0, probes=0,
        max_steps=200, save_every=5, device="cpu", dtype="float32",
    )  # fmt: skip


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        log = trainer.log_of(OUT)
        assert time.monotonic() < end, log.read_text() if log.exists() else "no log"
        time.sleep(0.05)


def kinds() -> list[str]:
    return [event["event"] for event in Run(OUT).events()]


def test_a_training_outlives_the_page_that_began_it(settings: TrainSettings) -> None:
    settings = replace(settings, max_steps=ENDLESS)
    server = (
        "import signal, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "  # as after `&`
        "from tunesmith.apps.studio.trainer import start; "
        "from tunesmith.config import TrainSettings; "
        f"from pathlib import Path, PosixPath; start({settings!r}); time.sleep(600)"
    )
    page = subprocess.Popen([sys.executable, "-c", server])
    wait_until(lambda: "Step" in kinds())
    page.kill()
    page.wait()
    steps = len(kinds())
    wait_until(lambda: len(kinds()) > steps)
    pid = runs.find(OUT).trainer
    assert pid is not None
    trainer.stop(runs.find(OUT))
    wait_until(lambda: runs.find(OUT).trainer is None)
    assert "Finished" not in kinds()


def test_stopped_and_gone_on_with(settings: TrainSettings) -> None:
    assert trainer.start(settings) == OUT
    wait_until(lambda: "Saved" in kinds())
    with pytest.raises(RunError, match="is being trained already, by process"):
        trainer.resume(runs.find(OUT))
    trainer.stop(runs.find(OUT))
    wait_until(lambda: runs.find(OUT).trainer is None)
    assert runs.find(OUT).trainer is None
    trainer.resume(runs.find(OUT))
    wait_until(lambda: "Finished" in kinds())
    assert (OUT / "adapter/adapter_model.safetensors").exists()


def test_one_name_is_begun_once(settings: TrainSettings) -> None:
    settings = replace(settings, max_steps=ENDLESS)
    trainer.start(settings)
    with pytest.raises(RunError, match="runs/mine exists already"):
        trainer.start(settings)
    wait_until(lambda: "Step" in kinds())
    trainer.stop(runs.find(OUT))
    wait_until(lambda: runs.find(OUT).trainer is None)


def test_a_number_left_in_a_lock_is_nobody(settings: TrainSettings) -> None:
    run = runs.create(settings)
    assert run.trainer is None
    (run.path / ".lock").write_text(str(os.getpid()))
    assert run.trainer is None
    with run.lock():
        assert run.trainer == os.getpid()


@pytest.fixture
def real(home: Path, smollm2: LocalModel) -> None:
    """The real model is there."""
    settle_in(home, smollm2)


FIRST = {
    "en": ("A model comes first: get one on the models page.",
           "Data comes first: write some on the data page."),
    "zh": ("先要有模型：到模型页下载一个。", "先要有数据：到数据页写一份。"),
}  # fmt: skip


@pytest.mark.parametrize("language", FIRST)
def test_the_page_says_what_comes_first(
    language: str, tmp_path: Path, home: Path, smollm2: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert visit("train", language).info[0].value == FIRST[language][0]
    settle_in(home, smollm2)
    assert visit("train", language).info[0].value == FIRST[language][1]


def test_every_setting_has_a_widget(
    tmp_path: Path, real: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_identity(Path("data/me.jsonl"), "Anvil", "Smith")
    form = visit("train")
    labels = {widget.label for kind in (form.number_input, form.text_input, form.selectbox,
                                        form.checkbox) for widget in kind}  # fmt: skip
    wanted = {item.name.replace("_", " ") for item in fields(TrainSettings)
              if item.name not in CHOSEN_ELSEWHERE}  # fmt: skip
    assert wanted <= labels


STATES = {
    "en": ("Stop", "Stopped; it can go on from its last checkpoint.", "Go on", "Trained"),
    "zh": ("停止", "已停止；可以从最后一个检查点继续。", "继续", "训练好了"),
}


@pytest.mark.parametrize("language", STATES)
def test_a_run_is_shown_as_it_stands(language: str, settings: TrainSettings) -> None:
    stop, stopped, go_on, done = STATES[language]
    trainer.start(replace(settings, max_steps=ENDLESS))
    wait_until(lambda: "Saved" in kinds())
    busy = visit("train", language)
    next(button for button in busy.button if button.label == stop).click().run()
    wait_until(lambda: runs.find(OUT).trainer is None)
    rests = visit("train", language)
    assert rests.warning[0].value == stopped
    assert any(button.label == go_on for button in rests.button)
    runs.find(OUT).record(Failed("The disk is full.", None))
    assert visit("train", language).error[0].value == "The disk is full."
    runs.find(OUT).record(Finished(5, OUT / "adapter", None, stopped_early=False))
    assert visit("train", language).success[0].value.startswith(done)


def test_the_plan_is_told_before_the_start(
    tmp_path: Path, real: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_identity(Path("data/me.jsonl"), "Anvil", "Smith", languages=["en"])
    shown = visit("train", "zh")
    shown.number_input(key="setting-replay").set_value(0)
    shown.number_input(key="setting-batch_size").set_value(1)
    shown.number_input(key="setting-max_steps").set_value(1)
    shown.button(key="plan").click().run()
    assert not shown.exception and not shown.error
    figures = {metric.label: metric.value for metric in shown.metric}
    assert list(figures) == ["时间", "内存", "步数", "token"]
    assert figures["步数"] == "1"
    assert not Path("runs").exists()
    Path("data/me.jsonl").write_text('{"messages": []}\n')
    shown.number_input(key="setting-max_steps").set_value(2)
    shown.button(key="plan").click().run()
    assert "me.jsonl" in shown.error[0].value
