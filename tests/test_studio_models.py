"""The models page and its downloads: they outlive the page, stop, go on, and say what is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
from streamlit.testing.v1 import AppTest

from tests.helpers_hub import REPO, WEIGHTS, partial_file, repository
from tests.helpers_page import settle_in, visit
from tests.hub_server import HubServer
from tunesmith.apps.cli import main
from tunesmith.apps.studio import puller
from tunesmith.apps.studio.inert import plain
from tunesmith.apps.studio.puller import Pull
from tunesmith.errors import DownloadError, ModelError, UsageError
from tunesmith.models.catalog import CATALOG
from tunesmith.models.store import LocalModel, installed

SPEC = f"hf:{REPO}"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder and a home of the test's own; no model is there."""
    monkeypatch.chdir(tmp_path)
    home.mkdir()
    return home


@pytest.fixture
def slow(hub: HubServer, tmp_path: Path) -> HubServer:
    """A hub whose model takes half a minute."""
    hub.publish(REPO, repository(tmp_path / "repository"))
    hub.faults.bytes_per_second = WEIGHTS // 30
    return hub


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, puller.every()
        time.sleep(0.05)


def the_pull() -> Pull:
    (pull,) = puller.every()
    return pull


def ended() -> bool:
    return all(pull.state != "running" for pull in puller.every())


def press(page: AppTest, label: str) -> AppTest:
    next(button for button in page.button if button.label == label).click().run()
    assert not page.exception
    return page


def texts(page: AppTest) -> list[str]:
    return [element.value.replace("\\", "") for element in page.markdown]


@pytest.mark.parametrize(
    ("language", "words"),
    [("en", "No model is here yet; get one below."), ("zh", "这里还没有模型；请在下面下载一个。")],
)
def test_without_a_model(language: str, words: str) -> None:
    page = visit("models", language)
    assert [info.value for info in page.info] == [words]
    assert len(page.dataframe[0].value) == len(CATALOG)
    assert list(page.dataframe[0].value.iloc[0])[1:3] == pytest.approx([0.0929, 0.4303], abs=1e-3)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_what_is_here_is_listed_and_deleted(hub: HubServer, tmp_path: Path, language: str) -> None:
    hub.publish(REPO, repository(tmp_path / "repository"), licence="[free](http://evil)")
    assert main(["pull", SPEC]) == 0
    page = visit("models", language)
    (card,) = (text for text in texts(page) if " · " in text)
    revision = hub.repos[REPO][0].sha[:12]
    assert f"402.1 kB · Hugging Face {REPO} · {revision} · [free](http://evil)" in card
    assert all("[free](" not in element.value for element in page.markdown)
    (button,) = (button for button in page.button if button.key == f"delete-{SPEC}")
    button.click().run()
    assert not page.exception
    assert "403.0 kB" in page.success[0].value
    assert not installed()


def test_a_pull_outlives_the_page_that_began_it(slow: HubServer, place: Path) -> None:
    server = f"""if True:
        import time
        from tunesmith.apps.studio import puller
        puller.start({SPEC!r})
        time.sleep(600)
    """
    page = subprocess.Popen([sys.executable, "-c", server])
    wait_until(lambda: bool(puller.every()) and the_pull().done > 0)
    page.kill()
    page.wait()
    slow.faults.bytes_per_second = 0
    wait_until(lambda: bool(installed()) and ended())
    assert installed()[0].name == SPEC
    assert not puller.every()


@pytest.mark.parametrize(
    ("language", "stop", "go_on", "said"),
    [
        ("en", "Stop", "Go on", "Stopped; what has come stays here."),
        ("zh", "停止", "继续", "已停止；已下载的部分会保留。"),
    ],
)
def test_begun_stopped_and_gone_on_with(
    slow: HubServer, place: Path, language: str, stop: str, go_on: str, said: str
) -> None:
    page = visit("models", language)
    page.text_input(key="spec").set_value(f" {SPEC} ")
    page.button[-1].click().run()
    wait_until(lambda: the_pull().done > 0)
    another = visit("models", language)
    assert f"**{SPEC}**" in texts(another)
    press(another, stop)
    wait_until(ended)
    partial = partial_file(place)
    assert partial is not None
    came = partial.stat().st_size
    assert 0 < came < WEIGHTS

    slow.faults.bytes_per_second = 0
    page = visit("models", language)
    assert page.info[0].value == said
    press(page, go_on)
    wait_until(lambda: bool(installed()) and ended())
    assert any(seen.range == f"bytes={came}-" for seen in slow.requests)
    assert not visit("models", language).info


def test_a_second_begin_changes_nothing(slow: HubServer) -> None:
    puller.start(SPEC)
    first = the_pull().pid
    puller.start(SPEC)
    assert the_pull().pid == first
    with pytest.raises(ModelError, match="is being pulled by another process"):
        puller.discard(the_pull())
    puller.cancel(the_pull())
    wait_until(ended)


def test_a_killed_pull_is_a_stopped_one_and_can_be_discarded(slow: HubServer, place: Path) -> None:
    puller.start(SPEC)
    wait_until(lambda: the_pull().done > 0)
    pid = the_pull().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(ended)
    assert the_pull().state == "stopped"
    page = visit("models")
    (button,) = (button for button in page.button if str(button.key).startswith("delete-hf"))
    button.click().run()
    assert not page.exception
    assert not puller.every()
    assert partial_file(place) is None


@pytest.mark.parametrize(
    ("language", "words"),
    [
        ("en", "nobody/nothing, revision master, is not on ModelScope"),
        ("zh", "ModelScope 上没有 nobody/nothing"),
    ],
)
def test_what_the_pull_says_when_it_fails(hub: HubServer, language: str, words: str) -> None:
    page = visit("models", language)
    page.text_input(key="spec").set_value("modelscope:nobody/nothing")
    page.button[-1].click().run()
    wait_until(ended)
    (error,) = visit("models", language).error
    assert words in error.value.replace("\\", "")
    assert "tunesmith" not in error.value


@pytest.mark.parametrize("spec", ["no-such-model", "/etc/passwd", ".", "hf:../x", "hf:a"])
def test_a_name_that_is_none_is_a_sentence(spec: str) -> None:
    page = visit("models")
    page.text_input(key="spec").set_value(spec)
    page.button[-1].click().run()
    assert len(page.error) == 1
    assert not page.exception
    assert not puller.every()


def test_a_home_that_cannot_be_written_is_a_sentence(place: Path) -> None:
    (place / "studio").write_text("a file where a folder must be")
    with pytest.raises(DownloadError, match="cannot be written"):
        puller.start(SPEC)


def test_a_folder_is_not_pulled(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a file or folder of this machine"):
        puller.start(str(tmp_path))


def test_a_broken_manifest_is_a_sentence_and_the_rest_is_there(place: Path) -> None:
    folder = place / "models" / "qwen3-0.6b"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{")
    page = visit("models")
    assert "is broken" in page.error[0].value
    assert page.selectbox(key="catalog").options


def test_pull_json_prints_events(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.publish(REPO, repository(tmp_path / "repository"))
    assert main(["pull", SPEC, "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events[:2]] == ["Chosen", "Progress"]
    assert events[-1]["event"] == "Ready"
    assert events[-1]["model"]["name"] == SPEC


def test_a_long_log_is_read_at_its_ends(place: Path) -> None:
    log = place / "studio/pulls/x.jsonl"
    log.parent.mkdir(parents=True)
    progress = ({"event": "Progress", "done": n, "total": 5000} for n in range(5000))
    lines = [{"event": "Begun", "spec": SPEC, "pid": 2**22 + 1}, *progress]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "Prog')
    pull = puller.read(log)
    assert pull is not None
    assert (pull.pid, pull.state, pull.done, pull.total) == (None, "stopped", 4999, 5000)


@pytest.mark.parametrize("text", ["[a](http://b) *c* $d$ :red[e] `f` <g> # h", "1. a\n\n- b"])
def test_plain_text_is_no_markdown(text: str) -> None:
    assert plain(text).replace("\\", "") == " ".join(text.split())
    marks = [mark for mark in "[]*$:`<#.-" if mark in text]
    assert all(plain(text).count(mark) == plain(text).count("\\" + mark) for mark in marks)


VISITS = """
    import sys
    from streamlit.testing.v1 import AppTest
    from tunesmith.apps.studio import puller

    def visit(name):
        script = f"from tunesmith.apps.studio.{name} import page; page()"
        page = AppTest.from_string(script, default_timeout=60).run()
        assert not page.exception, page.exception
        return page

    pages = ("chat", "compare", "models", "runs", "data", "train")
    first, *_ = [visit(f"{page}_page") for page in pages]
    for button in first.button:
        if "smollm2-135m" in button.label:
            button.click().run()
            (pull,) = puller.every()
            assert pull.state == "running"
            puller.cancel(pull)
    heavy = {"torch", "transformers", "peft"} & set(sys.modules)
    assert not heavy, heavy
"""


@pytest.mark.parametrize("with_model", [False, True])
def test_neither_pages_nor_a_download_load_what_computes(
    place: Path, smollm2: LocalModel, with_model: bool
) -> None:
    if with_model:
        settle_in(place, smollm2)
    done = subprocess.run(
        [sys.executable, "-c", dedent(VISITS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(puller.every()) == (not with_model)
    wait_until(ended)
