"""The compare page: nothing here, two sides of one prompt, many questions and their verdict."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from tests.helpers_page import visit
from tests.tiny_models import tiny_model_folder
from tunesmith.apps.studio.parts import desk
from tunesmith.config import TrainSettings
from tunesmith.data.identity import write_identity
from tunesmith.evaluation.record import recorded
from tunesmith.runs import Run
from tunesmith.training.train import train

RUN = Path("runs/mine")
NOTHING = {
    "en": "A model comes first: get one on the models page.",
    "zh": "先要有模型：到模型页下载一个。",
}
VERDICT = {"en": "verdict: ", "zh": "结论"}


@pytest.fixture
def place(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    desk().close()


@pytest.fixture
def run(place: Path) -> Path:
    """A training that has finished, and learnt nothing."""
    write_identity(Path("data/me.jsonl"), "Anvil", "Smith", languages=["en"])
    settings = TrainSettings(
        model=str(tiny_model_folder(place / "model")), data=(Path("data/me.jsonl"),), out=RUN,
        replay=0, probes=0, max_steps=1, device="cpu", dtype="float32",
    )  # fmt: skip
    list(train(settings))
    return RUN


def answers(page: AppTest) -> list[str]:
    return [html.proto.body for html in page.get("html")]


@pytest.mark.parametrize("language", NOTHING)
def test_without_a_model(language: str, place: Path) -> None:
    assert [info.value for info in visit("compare", language).info] == [NOTHING[language]]


def test_both_sides_of_one_prompt(run: Path) -> None:
    page = visit("compare")
    assert [box.value for box in page.selectbox[:2]] == [
        f"{run} · base",
        f"{run} · tuned",
    ]
    page.slider(key="compare-max-tokens").set_value(5)
    page.text_area(key="compare-question").set_value("Who are you?")
    page.button[0].click().run()
    assert not page.exception and not page.error
    assert len(answers(page)) == 2
    assert [caption.value for caption in page.caption] == [f"{run} · base", f"{run} · tuned"]


@pytest.mark.parametrize("language", VERDICT)
def test_many_questions_and_the_verdict_stay(language: str, run: Path) -> None:
    page = visit("compare", language)
    page.button(key="compare-ask").click().run()
    assert not page.exception and not page.error
    (table,) = answers(page)
    assert table.count("<tr>") == 1 + 2 * 20
    assert VERDICT[language] in page.warning[0].value
    assert page.caption[-1].value.endswith(str(run / "report.html"))
    kept = recorded(Run(run))
    assert kept is not None and len(kept[0]) == 40
    assert "Anvil" in (run / "report.html").read_text("utf-8")
    page.run()
    assert answers(page) == [table]


def test_questions_of_ones_own(run: Path) -> None:
    page = visit("compare")
    page.selectbox(key="compare-source").set_value("Questions of my own").run()
    page.button(key="compare-ask").click().run()
    assert page.error[0].value == "There is no question; write one a line."
    page.text_area(key="compare-texts").set_value("One <b>bold</b>?\n\nTwo?")
    page.button(key="compare-ask").click().run()
    assert not page.exception
    (table,) = answers(page)
    assert table.count("<tr>") == 3
    assert "One &lt;b&gt;bold&lt;/b&gt;?" in table
    assert not (run / "compare.json").exists()  # that is for the run's own questions


def test_an_adapter_of_another_base_is_refused_in_a_sentence(run: Path, place: Path) -> None:
    tiny_model_folder(place / "other", hidden=64)
    config = run / "config.toml"
    config.write_text(config.read_text().replace(str(place / "model"), str(place / "other")))
    page = visit("compare")
    page.button(key="compare-ask").click().run()
    assert not page.exception
    assert "was made for model" in page.error[0].value


def test_a_run_that_is_gone_is_a_sentence(run: Path, place: Path) -> None:
    page = visit("compare")
    run.rename("runs-elsewhere")
    page.button(key="compare-ask").click().run()
    assert not page.exception
    assert page.error or page.info
