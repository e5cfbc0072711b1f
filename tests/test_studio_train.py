"""Trainings begun from the page: they outlive it, stop, go on, and exclude one another."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from tests.tiny_models import tiny_model_folder
from tunesmith import runs
from tunesmith.apps.studio import trainer
from tunesmith.apps.studio.settings_form import CHOSEN_ELSEWHERE
from tunesmith.config import TrainSettings
from tunesmith.data.identity import write_identity
from tunesmith.errors import RunError
from tunesmith.models.store import LocalModel
from tunesmith.runs import Run

OUT = Path("runs/mine")
ENDLESS = 100_000  # steps; these trainings are stopped


@pytest.fixture
def settings(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> TrainSettings:
    monkeypatch.chdir(tmp_path)
    data = Path("data/me.jsonl")
    write_identity(data, "Anvil", "Smith")
    return TrainSettings(
        model=str(tiny_model_folder(tmp_path / "model")), data=(data,), out=OUT, replay=0,
        max_steps=400, save_every=5, device="cpu", dtype="float32",
    )  # fmt: skip


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
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
        "import sys, time; from tunesmith.apps.studio.trainer import start; "
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


def page() -> AppTest:
    def script() -> None:
        from tunesmith.apps.studio.train_page import page

        page()

    page = AppTest.from_function(script, default_timeout=60).run()
    assert not page.exception
    return page


def test_the_page_says_what_comes_first(
    tmp_path: Path, home: Path, smollm2: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert page().info[0].value == "A model comes first: get one on the chat page."
    home.mkdir()
    (home / "models").symlink_to(smollm2.path.parents[1])
    assert page().info[0].value == "Data comes first: write some on the data page."
    write_identity(Path("data/me.jsonl"), "Anvil", "Smith")
    form = page()
    labels = {widget.label for kind in (form.number_input, form.text_input, form.selectbox,
                                        form.checkbox) for widget in kind}  # fmt: skip
    wanted = {item.name.replace("_", " ") for item in fields(TrainSettings)
              if item.name not in CHOSEN_ELSEWHERE}  # fmt: skip
    assert wanted <= labels


def test_a_run_is_shown_as_it_stands(settings: TrainSettings) -> None:
    trainer.start(replace(settings, max_steps=ENDLESS))
    wait_until(lambda: "Saved" in kinds())
    shown = page()
    assert [button.label for button in shown.button if button.label == "Stop"] == ["Stop"]
    next(button for button in shown.button if button.label == "Stop").click().run()
    wait_until(lambda: runs.find(OUT).trainer is None)
    stopped = page()
    assert stopped.warning[0].value == "Stopped; it can go on from its last checkpoint."
    assert any(button.label == "Go on" for button in stopped.button)
