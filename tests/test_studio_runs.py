"""The runs page: what runs came to, side by side; notes, the adapter to take away, deleting."""

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from tests.helpers_page import settle_in, visit
from tunesmith import runs
from tunesmith.apps.plot import MOST_POINTS
from tunesmith.apps.story import differences
from tunesmith.apps.studio import trainer
from tunesmith.apps.studio.loss_chart import points
from tunesmith.apps.studio.runs_page import zipped
from tunesmith.config import TrainSettings
from tunesmith.errors import RunError
from tunesmith.models.store import LocalModel
from tunesmith.runs import Run
from tunesmith.training.events import Evaluated, Failed, Saved, Step

SETTINGS = TrainSettings(model="smollm2-135m", data=(Path("data/me.jsonl"),))
STEPS = 4
EMPTY = {
    "en": "No run is here yet: begin one on the training page.",
    "zh": "这里还没有训练记录：到训练页开始一次。",
}
STATES = {"en": ["finished", "failed", "stopped"], "zh": ["已完成", "失败", "已停止"]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(name: str, **settings: Any) -> Run:
    """A run as far as its events go."""
    run = runs.create(replace(SETTINGS, out=Path("runs") / name, **settings))
    for step in range(1, STEPS + 1):
        run.record(Step(step, STEPS, 3.0 / step, 1e-3, 1.0, 100, 90, 0.5, 10**8))
    run.record(Evaluated(STEPS, 1.25, best=True, kl=0.02, agreement=0.98))
    run.record(Saved(STEPS, run.checkpoints / "step"))
    return run


def finished(name: str) -> Run:
    run = made(name)
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").write_text("{}")
    (run.adapter / "adapter_model.safetensors").write_bytes(b"\x00" * 5000)
    (run.adapter / "tunesmith.json").write_text("{}")
    return run


def press(page: AppTest, key: str) -> AppTest:
    next(button for button in page.button if button.key == key).click().run()
    assert not page.exception
    return page


def errors(page: AppTest) -> list[str]:
    return [error.value.replace("\\", "") for error in page.error]


@pytest.mark.parametrize("language", EMPTY)
def test_without_runs(language: str) -> None:
    assert [info.value for info in visit("runs", language).info] == [EMPTY[language]]


@pytest.mark.parametrize("language", STATES)
def test_the_table_tells_how_far_each_came(language: str) -> None:
    finished("one")
    made("two").record(Failed("boom", None))
    made("three")
    table = visit("runs", language).dataframe[0].value
    told = {row.iloc[0]: row for _, row in table.iterrows()}
    assert [told[name].iloc[2] for name in ("one", "two", "three")] == STATES[language]
    assert list(told["one"].iloc[[1, 3, 4, 5]]) == ["smollm2-135m", "4 / 4", 1.25, 0.02]


def test_a_run_that_is_being_trained_is_said_and_not_deleted() -> None:
    run = made("busy")
    with run.lock():
        page = visit("runs")
        assert page.dataframe[0].value.iloc[0, 2] == "running"
        press(page, "delete-busy")
        assert "is being trained by process" in errors(page)[0]
    assert run.metrics.exists()
    assert "busy is removed" in press(visit("runs"), "delete-busy").success[0].value
    assert not list(Path("runs").iterdir())


def test_several_are_compared_by_what_differs() -> None:
    made("one", learning_rate=1e-3)
    made("two", lora_r=32)
    page = visit("runs")
    page.multiselect(key="runs").set_value(["one", "two"]).run()
    assert not page.exception
    rows = page.dataframe[1].value.set_index("setting")
    assert dict(rows["one"]) == {"learning rate": "0.001", "lora r": "8"}
    assert dict(rows["two"]) == {"learning rate": "automatic", "lora r": "32"}
    assert len(page.get("vega_lite_chart")) == 1


def test_the_same_settings_are_said_to_be_so() -> None:
    made("one")
    made("two")
    page = visit("runs", "zh")
    page.multiselect(key="runs").set_value(["one", "two"]).run()
    assert "它们的设置相同。" in [caption.value for caption in page.caption]
    assert (
        differences({"one": {"data": ["a"], "out": "x"}, "two": {"data": ["a"], "out": "y"}}) == []
    )


def test_curves_are_thinned_and_end_where_they_end() -> None:
    steps = [{"event": "Step", "step": n, "loss": 1 / n} for n in range(1, 1704)]
    steps += [{"event": "Step", "step": 1704, "loss": float("nan")}]
    curve = points("one", steps, "Step")
    assert len(curve) <= MOST_POINTS
    assert [point["step"] for point in curve[-2:]] == [1699, 1703]


def test_notes_are_kept_and_never_lost() -> None:
    run = made("one")
    page = visit("runs")
    page.text_area(key="notes-one").set_value("rank 8 太小").run()
    press(page, "save-one")
    assert (run.path / "notes.md").read_text("utf-8") == run.notes == "rank 8 太小"
    other = visit("runs")
    assert other.text_area(key="notes-one").value == "rank 8 太小"
    other.text_area(key="notes-one").set_value("newer").run()
    press(other, "save-one")
    page.text_area(key="notes-one").set_value("older").run()
    press(page, "save-one")
    assert "were changed elsewhere meanwhile" in errors(page)[0]
    assert page.text_area(key="notes-one").value == "older"
    assert run.notes == "newer"


def test_the_adapter_comes_as_a_zip() -> None:
    run = finished("one")
    (run.adapter / "link").symlink_to("/etc/hostname")
    with zipfile.ZipFile(io.BytesIO(zipped(run))) as archive:
        assert archive.namelist() == [
            "one/adapter_config.json", "one/adapter_model.safetensors", "one/tunesmith.json",
        ]  # fmt: skip
        assert archive.read("one/adapter_model.safetensors") == b"\x00" * 5000
    assert len(visit("runs").get("download_button")) == 1


def test_deleting_takes_the_log_along() -> None:
    run = finished("one")
    trainer.log_of(run.path).write_text("a log")
    page = press(visit("runs"), "delete-one")
    assert "one is removed; " in page.success[0].value
    assert page.info[0].value == EMPTY["en"]
    assert not list(Path("runs").iterdir())


def test_a_run_deleted_while_the_page_is_open() -> None:
    made("one")
    made("two")
    page = visit("runs")
    page.multiselect(key="runs").set_value(["one", "two"]).run()
    runs.remove(runs.find("one"))
    page.run()
    assert not page.exception
    assert page.multiselect(key="runs").value == ["two"]
    runs.remove(runs.find("two"))
    page.run()
    assert page.info[0].value == EMPTY["en"]


def test_what_is_gone_is_a_sentence() -> None:
    run = made("one")
    freed = run.size
    assert runs.remove(run) == freed > 0
    for attempt in (lambda: runs.remove(run), lambda: run.write_notes("x"), lambda: run.begun):
        with pytest.raises(RunError, match="runs/one is gone"):
            attempt()


def half_config(run: Run) -> None:
    (run.path / "config.toml").write_text('model = "smo')


def no_config(run: Run) -> None:
    (run.path / "config.toml").unlink()


def cut_line(run: Run) -> None:
    with run.metrics.open("a") as file:
        file.write('{"event": "Step", "st')


def cut_inside(run: Run) -> None:
    cut_line(run)
    run.record(Failed("later", None))


def no_event(run: Run) -> None:
    with run.metrics.open("a") as file:
        file.write("[1]\n")


def not_text(run: Run) -> None:
    run.metrics.write_bytes(b"\xff\xfe\n")


def no_metrics(run: Run) -> None:
    run.metrics.unlink()


def notes_are_no_text(run: Run) -> None:
    (run.path / "notes.md").write_bytes(b"\xff\xfe")


def nothing_trained(run: Run) -> None:
    run.metrics.write_text(json.dumps({"event": "Replaying", "done": 1, "total": 2}) + "\n")


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (half_config, "config.toml is not TOML"), (no_config, None), (cut_line, None),
        (cut_inside, "metrics.jsonl cannot be read"), (no_event, "does not hold events"),
        (not_text, "metrics.jsonl cannot be read"), (no_metrics, None), (nothing_trained, None),
        (notes_are_no_text, "notes.md cannot be read"),
    ],
)  # fmt: skip
def test_a_broken_run_breaks_no_page(breaks: Callable[[Run], None], said: str | None) -> None:
    made("good")
    breaks(made("bad"))
    Path("runs/empty").mkdir()
    page = visit("runs")
    names = [str(name) for name in page.dataframe[0].value.iloc[:, 0]]
    assert sorted(names) == (["good"] if breaks is no_config else ["bad", "good"])
    page.multiselect(key="runs").set_value(names).run()
    assert not page.exception
    assert [said in error for error in errors(page)] == [True] if said else not errors(page)


def test_the_adapter_of_another_base_is_a_sentence_in_the_chat(
    home: Path, smollm2: LocalModel
) -> None:
    settle_in(home, smollm2)
    run = finished("mine")
    info = {
        "base_name": "other",
        "base_source": "hf",
        "base_revision": "1",
        "base_sha256": "0" * 64,
    }
    (run.adapter / "tunesmith.json").write_text(json.dumps(info))
    (run.adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')

    def script() -> None:
        from tunesmith.apps.studio.chat_page import page

        page()

    page = AppTest.from_function(script, default_timeout=60).run()
    page.chat_input[0].set_value("Hi").run()
    assert not page.exception
    assert "was made for other (000000000000), not for smollm2-135m" in page.error[0].value
