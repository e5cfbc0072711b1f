"""The report: what stands in it, that nothing in it acts, and what a browser makes of it."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from tests.helpers_browser import chromium
from tests.tiny_models import tiny_model_folder
from tunesmith import runs
from tunesmith.apps import commands
from tunesmith.apps.chart import HEIGHT, WIDTH, Line, chart
from tunesmith.apps.cli import main
from tunesmith.apps.comparison import verdict_lines
from tunesmith.apps.plot import MOST_POINTS
from tunesmith.apps.report import report, side_by_side
from tunesmith.config import TrainSettings
from tunesmith.data.identity import write_identity
from tunesmith.data.messages import Message
from tunesmith.evaluation.compare import Answer, Compared, Question
from tunesmith.evaluation.record import as_json
from tunesmith.evaluation.verdict import Share, Verdict
from tunesmith.language import set_language
from tunesmith.runs import Run
from tunesmith.training.events import Evaluated, Failed, Finished, Planned, Started, Step
from tunesmith.training.train import train

MACHINE = {"tunesmith": "0.1.0", "torch": "2.13.0", "processor": "Abacus 9", "gpu": "H <100>"}
HOSTILE = "</style></title><script>alert(1)</script><img src=//x.invalid/y onerror=alert(2)>\u202e"
GOOD = Verdict(Share(9, 10), Share(1, 1), Share(10, 10), 0.4, kl=0.3, agreement=0.8)
WORDS = {
    "en": ("Training report", "learnt", "drifted", "stops", "Before and after", "finished"),
    "zh": ("训练报告", "学会了", "原来会的有些走样", "说完会停", "前后对比", "已完成"),
}
PLANNED = Planned(
    samples=40, replay=8, held_out=4, tokens=4000, trained_tokens=900, cut=1, dropped=0, steps=4,
    learning_rate=1e-3, trainable_parameters=1234, total_parameters=99999, device="cpu",
    dtype="float32", micro_batch_tokens=1024, recomputed_layers=0, recomputed_mlps=0, layers=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(name: str, machine: dict[str, str] | None = None, **settings: Any) -> Run:
    """A run of four steps, not finished."""
    given = TrainSettings(data=(Path("data/me.jsonl"),), out=Path("runs") / name)
    run = runs.create(replace(given, **settings))
    run.write_data(
        {
            "files": {"data/me.jsonl": "ab" * 32}, "fingerprint": "cd" * 32, "samples": 32,
            "held_out": 4, "cut": 1, "dropped": 0, "system": "Be <b>brief</b>.", "identity": None,
            "model": {"name": "smollm2-135m", "sha256": "ef" * 32}, "template": "01" * 32,
        }
    )  # fmt: skip
    run.record(PLANNED)
    run.record(Started(0, environment=machine or {}))
    run.record(Evaluated(0, 3.5, best=False, kl=0.0, agreement=1.0))
    for step in range(1, 5):
        run.record(Step(step, 4, 3.0 / step, 1e-3, 1.0, 100, 90, 0.5, 10**8 * step))
    run.record(Evaluated(2, 1.25, best=True, kl=0.021, agreement=0.98))
    run.record(Evaluated(4, 1.75, best=False, kl=0.043, agreement=0.97))
    return run


def finished(name: str, **more: Any) -> Run:
    run = made(name, **more)
    run.adapter.mkdir()
    run.record(Finished(4, run.adapter, 1.25, False))
    return run


def pair(kind: Any, question: str, base: str, tuned: str, *, right: bool = True) -> Compared:
    asked = Question(kind, question, (Message("user", question),))
    learnt, kept = (None, right) if kind == "neutral" else (right, None)
    return Compared(asked, Answer(base, True), Answer(tuned, False), learnt, kept)


def compared(name: str, verdict: Verdict = GOOD, text: str = "I am Anvil.", **more: Any) -> Run:
    run = finished(name, **more)
    pairs = [
        pair("identity", "Who are you?", "I am a robot.", text),
        pair("neutral", "首都在哪里？", "在巴黎。", "在罗马。", right=False),
    ]
    run.write_comparison(as_json([*pairs, verdict]))
    return run


def page(run: Run, language: str = "en") -> str:
    def write() -> str:
        set_language(language)
        return report(run)

    return copy_context().run(write)


def visible(html: str) -> str:
    """The page's text, on one line."""
    body = html.partition("<body>")[2]
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


@pytest.mark.parametrize("language", WORDS)
def test_all_of_a_run_stands_on_the_page(language: str) -> None:
    text = visible(page(compared("one", machine=MACHINE), language))
    for part in (
        *WORDS[language], "one", "smollm2-135m", "3.500 → 1.250", "0.021", "4 / 4", "400.0 MB",
        "ab" * 32, "cd" * 32, "4,000", "Abacus 9", "2.13.0", "--lora-r", "200", "1,234",
    ):  # fmt: skip
        assert part in text, part
    assert len(page(compared("two"), language)) < 100_000


@pytest.mark.parametrize("language", WORDS)
def test_the_verdict_is_said_in_the_words_of_compare(language: str) -> None:
    def lines() -> list[str]:
        set_language(language)
        return list(verdict_lines(GOOD))

    html = page(compared("one"), language).replace("&#39;", "'")
    *figures, last = copy_context().run(lines)
    assert len(figures) == 4
    assert all(line in html for line in figures)
    advice = re.search('<p class="advice">(.*)</p>', html)
    assert advice and last.endswith(advice[1])


def test_answers_stand_side_by_side_with_the_differences_marked() -> None:
    html = page(compared("one"))
    assert "I am <del>a robot</del>." in html
    assert "I am <ins>Anvil</ins>." in html
    assert "在<ins>罗马</ins>。" in html
    assert html.index("About itself") < html.index("What it should not change")
    assert re.findall('class="mark (\\w+)">', html) == ["good", "bad"]
    assert html.count("cut off") == 2


@pytest.mark.parametrize("name", ["one", "a <script>alert(3)<&script> é"])
def test_nothing_that_is_told_acts(name: str) -> None:
    run = finished(name, machine={"processor": HOSTILE}, system=HOSTILE)
    asked = Question("held_out", HOSTILE, (Message("user", HOSTILE),), HOSTILE)
    answers = Compared(asked, Answer(HOSTILE, True), Answer(HOSTILE + "!", True), True, None)
    run.write_comparison(as_json([answers, GOOD]))
    run.write_data(run.data | {"system": HOSTILE, "files": {HOSTILE: HOSTILE}})
    for html in (page(run), side_by_side([run, finished("two")])):
        assert html.count("<style>") == html.count("</style>") == 1
        assert not re.search(r"<(script|img)|\u202e", html)
    assert "&lt;script&gt;" in page(run)
    assert "&lt;/title&gt;" in page(run)


def test_long_texts_keep_the_page_small() -> None:
    html = page(compared("one", text="long " * 1_000_000))
    assert len(html) < 100_000


def test_what_does_not_fit_is_counted() -> None:
    run = finished("one")
    pairs = [pair("identity", str(number), "好" * 1900, "坏" * 1900) for number in range(300)]
    run.write_comparison(as_json([*pairs, GOOD]))
    html = page(run)
    assert html.count("<article>") == 400_000 // (2 * 1900 + 2 * len("<del></del>") + 3)
    assert f"{300 - html.count('<article>')} more are in compare.json." in html
    assert len(html.encode()) < 2_000_000


def test_a_run_that_was_not_compared_says_how_to() -> None:
    text = visible(page(finished("one")))
    assert "have not been asked the same yet" in text
    assert "tunesmith compare runs/one" in text
    assert "Before and after" not in text


def test_a_run_that_has_not_finished_says_so() -> None:
    run = made("my run")
    assert "at step 4 of 4. To go on with it: tunesmith train --resume 'runs/my run'" in visible(
        page(run)
    ).replace("&#39;", "'")
    run.record(Failed("The disk <is> full.", None))
    assert "The disk &lt;is&gt; full." in page(run)
    with run.lock():
        text = visible(page(run))
    assert "running" in text
    assert "--resume" not in text


def test_a_run_that_has_hardly_begun() -> None:
    run = made("one")
    run.metrics.unlink()
    text = visible(page(run))
    assert "at step 0 of ?" in text
    assert text.count("not recorded") == 2


def test_what_an_older_run_did_not_record_is_not_made_up() -> None:
    text = visible(page(finished("one")))
    assert text.index("Environment") < text.index("not recorded")


def test_only_other_settings_stand_apart() -> None:
    html = page(finished("one", lora_r=32))
    apart = html[html.index("Other than the defaults") : html.index("<details>")]
    assert re.findall("<code>(.*?)</code>", apart) == ["--data", "--lora-r"]
    assert len(re.findall("<code>--", html[html.index("<details>") :])) > 30


@pytest.mark.parametrize("language", ["en", "zh"])
def test_several_stand_beside_one_another(language: str) -> None:
    every = [compared("one"), finished("two", lora_r=32), made("three", learning_rate=5e-4)]

    def write() -> str:
        set_language(language)
        return side_by_side(every)

    html = copy_context().run(write)
    cells = [
        re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", html, re.S)
    ]
    assert cells[0] == ["", "one", "two", "three"]
    assert ["9 / 10", "–", "–"] in [row[1:] for row in cells]
    assert ["1.250"] * 3 in [row[1:] for row in cells]
    assert ["8", "32", "8"] in [row[1:] for row in cells]
    assert html.count("<polyline") == 3
    assert html.count("tunesmith compare ") == 2


def test_runs_of_one_name_are_told_apart() -> None:
    html = side_by_side([made("one"), made("x/one")])
    assert "<th>runs/one</th><th>runs/x/one</th>" in html


def test_curves_stay_in_their_box_and_leave_out_what_is_no_number() -> None:
    points = tuple((step, 7.3 / step) for step in range(1, 5000))
    drawn = chart([Line("a", (*points, (5000, float("nan"))))])
    assert drawn is not None
    places = [tuple(map(float, p.split(","))) for p in drawn.shapes[0].points.split()]
    assert len(places) <= MOST_POINTS
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)
    assert drawn.upright[0][1] == "0"
    assert chart([Line("a", ((1, float("inf")),))]) is None
    flat = chart([Line("a", ((0, 0.0),), dotted=True)])
    assert flat is not None and len(flat.shapes[0].dots) == 1


def no_metrics_event(run: Run) -> None:
    run.metrics.write_text('{"event": "Step", "step": 1}\n')


def not_text(run: Run) -> None:
    run.metrics.write_bytes(b"\xff\xfe\n")


def half_config(run: Run) -> None:
    (run.path / "config.toml").write_text('model = "smo')


def no_data(run: Run) -> None:
    (run.path / "data.json").unlink()


def other_data(run: Run) -> None:
    run.write_data({"files": []})


def other_comparison(run: Run) -> None:
    run.write_comparison({"pairs": 3})


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (no_metrics_event, "metrics.jsonl does not hold events"),
        (not_text, "metrics.jsonl cannot be read"), (half_config, "config.toml is not TOML"),
        (no_data, "data.json cannot be read"), (other_data, "data.json is not what training"),
        (other_comparison, "compare.json does not hold a comparison"),
    ],
)  # fmt: skip
def test_a_broken_run_is_one_sentence(
    breaks: Callable[[Run], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    breaks(compared("one"))
    assert main(["report", "one"]) == 6
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not Path("runs/one/report.html").exists()


def test_the_command_writes_where_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    compared("one")
    finished("two")
    assert main(["report", "one"]) == main(["report", "runs/one"]) == 0
    assert capsys.readouterr().out == "report: runs/one/report.html\n" * 2
    assert main(["report", "one", "runs/one", "-o", "new/one.html"]) == 0
    assert Path("new/one.html").read_text("utf-8") == Path("runs/one/report.html").read_text(
        "utf-8"
    )
    assert main(["report", "one", "two", "-o", "both.html"]) == 0
    assert "Runs beside one another" in Path("both.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "name a run"), (["three"], 6, "No run at three; runs here: one, two."),
        (["one", "two"], 2, "needs a file to write: -o runs.html"),
        (["one", "-o", "here.html"], 2, "here.html exists already; add --overwrite"),
        (["one", "-o", "here.html/x.html"], 6, "here.html/x.html cannot be written"),
        (["one", "--ouch"], 2, "there is no --ouch"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_sentence(
    words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finished("one")
    finished("two")
    Path("here.html").write_text("mine")
    assert main(["report", *words]) == code
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and not out
    assert Path("here.html").read_text() == "mine"


def test_compare_ends_with_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real training of a tiny model, compared: its page shows the answers and the token mask."""
    write_identity(Path("me.jsonl"), "Anvil", "Smith", languages=["en"])
    settings = TrainSettings(
        model=str(tiny_model_folder(tmp_path / "model")), data=(Path("me.jsonl"),),
        out=Path("runs/mine"), replay=0, probes=2, max_steps=1, device="cpu", dtype="float32",
    )  # fmt: skip
    list(train(settings))
    Path("ask.txt").write_text("Who are you?\n")
    capsys.readouterr()
    assert main(["compare", "mine", "--ask", "ask.txt"]) == 0
    assert "report:" not in capsys.readouterr().out
    run = runs.find("mine")
    assert run.comparison is None
    assert commands.compare("mine", questions=1) == 1
    assert capsys.readouterr().out.endswith("report: runs/mine/report.html\n")
    html = run.report.read_text("utf-8")
    assert "not learnt" in html and html.count("<article>") == 2 * 2
    assert html.count("<pre>") == 3 and 'class="t" title=' in html
    assert "processor" in html and "not recorded" not in html
    assert commands.compare("mine", questions=1, json=True) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == run.comparison
    assert err == "report: runs/mine/report.html\n"
    run.report.unlink()
    run.report.mkdir()
    assert commands.compare("mine", questions=1) == 1
    out, err = capsys.readouterr()
    assert "not learnt" in out
    assert err == "no report: runs/mine/report.html cannot be written (Is a directory).\n"
    Path("me.jsonl").write_text("{}\n")
    assert "<pre>" not in page(run)
    Path("me.jsonl").unlink()
    shutil.rmtree(tmp_path / "model")
    assert "<pre>" not in page(run)


@contextmanager
def opened(file: Path, scheme: Any, width: int) -> Iterator[tuple[Page, list[str]]]:
    """The file in a browser without a network, and what it complains of or asks for."""
    with chromium() as browser:
        context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": 800}, offline=True
        )
        shown, heard = context.new_page(), list[str]()
        shown.on("console", lambda message: heard.append(message.text))
        shown.on("pageerror", lambda error: heard.append(str(error)))
        shown.on("request", lambda request: heard.append(request.url))
        shown.goto(file.resolve().as_uri())
        yield shown, heard
        browser.close()


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_and_loads_nothing_more(language: str, scheme: str) -> None:
    run = compared("one", machine=MACHINE, text=HOSTILE)
    run.report.write_text(page(run, language), "utf-8")
    with opened(run.report, scheme, 400) as (shown, heard):
        assert heard == [run.report.resolve().as_uri()]
        assert shown.title() == "one · tunesmith"
        assert shown.locator("html").get_attribute("lang") == language
        assert "<script>alert(1)</script>" in shown.locator("article ins").first.inner_text()
        assert shown.locator("svg polyline").count() == 3
        assert shown.evaluate("document.documentElement.scrollWidth") <= 400
        assert (_brightness(shown, "backgroundColor") > _brightness(shown, "color")) == (
            scheme == "light"
        )
        assert not shown.locator("details dl").is_visible()
        shown.emulate_media(media="print")
        assert _brightness(shown, "backgroundColor") == 3 * 255
        assert shown.pdf().startswith(b"%PDF")


def test_many_runs_do_not_widen_a_telephone() -> None:
    every = [compared(f"a-run-with-quite-a-long-name-{n}", lora_r=n) for n in range(1, 8)]
    file = Path("runs.html")
    file.write_text(side_by_side(every), "utf-8")
    with opened(file, "dark", 400) as (shown, heard):
        assert heard == [file.resolve().as_uri()]
        assert shown.locator("svg polyline").count() == 7
        assert shown.evaluate("document.documentElement.scrollWidth") <= 400


def _brightness(shown: Page, what: str) -> int:
    color = shown.evaluate(f"getComputedStyle(document.body).{what}")
    return sum(map(int, re.findall(r"\d+", color)))
