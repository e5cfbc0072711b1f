"""Rows as tokens: marked, escaped, counted, and never at the price of torch in the page."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from tests.helpers_data import jsonl
from tests.helpers_page import visit
from tests.test_studio_data import BAD_ROW
from tunesmith import paths
from tunesmith.apps.studio import token_view
from tunesmith.models.store import LocalModel

HI = {"instruction": "<img src=x> Hi", "output": "<script>alert(1)</script>"}
LONG = {"instruction": "Count.", "output": "one two three " * 40}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    return tmp_path


def tokens(language: str = "en") -> AppTest:
    """The page with the tokens opened."""
    page = visit("data", language)
    page.session_state["view"] = {"en": "Tokens", "zh": "词元"}[language]
    page.run()
    assert not page.exception
    return page


def test_no_model_yet(folder: Path, home: Path) -> None:
    (folder / "data/a.jsonl").write_text(jsonl(HI))
    assert tokens().info[0].value == "A model comes first: get one on the models page."


def test_no_good_row_yet(folder: Path, smollm2: LocalModel) -> None:
    (folder / "data/a.jsonl").write_text(BAD_ROW)
    assert tokens().info[0].value == "No row can be trained on yet; what is wrong stands above."


@pytest.mark.parametrize(("language", "said"), [("en", "of them trained."), ("zh", "个参与训练。")])
def test_trained_tokens_are_marked_and_all_text_is_text(
    folder: Path, smollm2: LocalModel, language: str, said: str
) -> None:
    (folder / "data/a.jsonl").write_text(BAD_ROW + jsonl(HI, LONG))
    page = tokens(language)
    assert not page.error
    shown = page.get("html")[-1].proto.body
    assert "<script" not in shown and "<img" not in shown
    assert 'class="t"' in shown and "&lt;" in shown
    assert said in page.markdown[-1].value
    assert "`data/a.jsonl:2`" in [caption.value for caption in page.caption]


def test_the_language_may_change_meanwhile(folder: Path, smollm2: LocalModel) -> None:
    (folder / "data/a.jsonl").write_text(jsonl(HI))
    page = tokens()
    page.args = ("data", "zh")
    page.run()
    assert not page.exception and not page.error
    assert [tab.label for tab in page.tabs[-2:]] == ["数据行", "词元"]


def test_a_limit_cuts_what_is_drawn_and_counted(folder: Path, smollm2: LocalModel) -> None:
    (folder / "data/a.jsonl").write_text(jsonl(HI, LONG))
    page = tokens()
    assert "<s " not in page.get("html")[-1].proto.body
    page.slider[0].set_value(20).run()
    assert "<s " in page.get("html")[-1].proto.body
    assert "A limit of 20 tokens cuts 2 samples" in page.markdown[-1].value
    page.number_input[0].set_value(2).run()
    assert "three" in page.get("html")[-1].proto.body


def test_many_rows_and_tokens_are_capped(
    folder: Path, smollm2: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_view, "MOST_ROWS", 2)
    monkeypatch.setattr(token_view, "MOST_TOKENS", 40)
    (folder / "data/a.jsonl").write_text(jsonl(LONG, HI, LONG))
    captions = [caption.value for caption in tokens().caption]
    assert "Only the first 2 rows are counted." in captions
    assert "Only the first 40 tokens are shown." in captions


def test_bars_count_every_sample() -> None:
    assert [bar["samples"] for bar in token_view.bars([1, 2, 2, 4])] == [1, 2, 0, 1]
    wide = token_view.bars([100, 5000])
    assert sum(int(bar["samples"]) for bar in wide) == 2
    assert len(wide) <= token_view.BARS + 1
    assert wide[0]["tokens"] == "0–250"


def test_a_tokenizer_is_converted_by_a_process_of_its_own(
    folder: Path, home: Path, smollm2: LocalModel
) -> None:
    (home / "models").mkdir(parents=True)
    (home / "models/smollm2-135m").symlink_to(smollm2.path.parent)
    (folder / "data/a.jsonl").write_text(jsonl(HI))
    script = (
        "import sys; from tests.test_studio_tokens import tokens\n"
        "page = tokens(); assert not page.error, page.error; assert page.slider\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list((paths.cache_dir() / "tokenizers").glob("*/tokenizer.json"))
