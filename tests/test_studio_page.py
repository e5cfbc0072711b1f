"""The page's states, in both languages, against the real model."""

import os
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import psutil
import pytest
from streamlit.testing.v1 import AppTest

import tunesmith
from tests.helpers_page import settle_in
from tunesmith.apps.studio.history import History
from tunesmith.apps.studio.parts import desk
from tunesmith.models.store import LocalModel

APP = Path(tunesmith.__file__).parent / "apps/studio/app.py"
GREETINGS = {"en": "How can I help?", "zh": "有什么可以帮您的？"}


@pytest.fixture
def place(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder and a home of the test's own; no model is there."""
    monkeypatch.chdir(tmp_path)
    home.mkdir()
    yield home
    desk().close()


@pytest.fixture
def model(place: Path, smollm2: LocalModel) -> str:
    """The real model is there."""
    settle_in(place, smollm2)
    return smollm2.name


def visit(language: str = "en", **address: str) -> AppTest:
    page = AppTest.from_file(str(APP), default_timeout=120)
    page.query_params["lang"] = language
    for name, value in address.items():
        page.query_params[name] = value
    page.run()
    assert not page.exception
    return page


def say(page: AppTest, text: str) -> AppTest:
    page.slider(key="chat-max-tokens").set_value(12)
    page.chat_input[0].set_value(text).run()
    assert not page.exception
    return page


def said(page: AppTest) -> list[tuple[str, str]]:
    return [(message.name, message.markdown[0].value) for message in page.chat_message]


def button(page: AppTest, key: str) -> Any:
    return next(one for one in page.button if one.key == key)


@pytest.mark.parametrize(("language", "words"), [("en", "A model first"), ("zh", "先要有一个模型")])
def test_without_a_model_the_page_offers_one(place: Path, language: str, words: str) -> None:
    page = visit(language)
    assert [title.value for title in page.subheader] == [words]
    assert any("smollm2-135m" in one.label for one in page.button)


@pytest.mark.parametrize("language", GREETINGS)
def test_an_answer_comes_and_stays(language: str, model: str) -> None:
    page = visit(language)
    assert said(page) == [("assistant", GREETINGS[language])]
    say(page, "Say hi.")
    (_, question, answer) = said(page)
    assert question == ("user", "Say hi.")
    assert answer[1]
    captions = [caption.value for caption in page.caption]
    assert any({"en": "tokens/s", "zh": "token/秒"}[language] in text for text in captions)
    again = visit(language, c=str(page.query_params["c"]))
    assert said(again) == said(page)


def test_answer_again_and_a_changed_question(model: str) -> None:
    page = say(visit(), "Say hi.")
    first = said(page)
    button(page, "again-1").click().run()
    assert [role for role, _ in said(page)] == ["assistant", "user", "assistant"]
    assert said(page)[:2] == first[:2]
    (area,) = (area for area in page.text_area if str(area.key).startswith("text-"))
    area.set_value("Say bye.")
    button(page, "send-0").click().run()
    assert [role for role, _ in said(page)] == ["assistant", "user", "assistant"]
    assert said(page)[1] == ("user", "Say bye.")


def test_the_list_finds_renames_and_deletes(place: Path, model: str) -> None:
    history = History(place / "conversations.sqlite")
    ids = {text: history.begin(text, model, None) for text in ("rain", "snow")}
    for text, id in ids.items():
        history.add(id, "user", text)
    page = visit(c=ids["rain"])
    page.text_input(key="search").set_value("sno").run()
    opened = [one.key for one in page.button if str(one.key).startswith("open-")]
    assert opened == [f"open-{ids['snow']}"]
    page.text_input(key=f"title-{ids['snow']}").set_value("ice").run()
    button(page, f"delete-{ids['snow']}").click().run()
    assert [one.title for one in history.conversations()] == ["rain"]


def test_a_broken_file_is_a_sentence(place: Path, model: str) -> None:
    (place / "conversations.sqlite").write_bytes(b"this is no database at all" * 99)
    page = visit()
    assert "conversations.sqlite cannot be read or written" in page.error[0].value


def test_a_model_that_went_away_is_said(place: Path, model: str) -> None:
    history = History(place / "conversations.sqlite")
    id = history.begin("Hello", "runs/gone", None)
    page = visit(c=id)
    assert page.info[0].value.startswith("runs/gone is gone")
    assert page.selectbox(key=f"target-{id}").value == model


@pytest.mark.parametrize("language", GREETINGS)
def test_an_engine_that_dies_is_a_sentence(language: str, model: str) -> None:
    page = say(visit(language), "Say hi.")
    page.slider(key="chat-max-tokens").set_value(1000)

    def kill() -> None:
        for child in psutil.Process().children(recursive=True):
            child.kill()

    timer = Timer(1.0, kill)
    timer.start()
    page.chat_input[0].set_value("Write a very long story about a smith.").run()
    timer.join()
    assert not page.exception
    assert page.error
    assert said(page)[3] == ("user", "Write a very long story about a smith.")
    assert said(say(page, "Say hi."))[-1][0] == "assistant"
    assert not page.error


def test_nobody_gets_in_without_the_password(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TUNESMITH_PASSWORD", "秘密")
    page = visit()
    assert not page.chat_message
    page.text_input[0].set_value("guess").run()
    assert page.error[0].value == "That is not the password."
    page.text_input[0].set_value("秘密").run()
    assert said(page) == [("assistant", GREETINGS["en"])]
