"""The whole way in a real browser with the real model, as somebody who never opens a terminal."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.helpers_browser import Server, chromium, free_port, wait_until
from tests.helpers_page import settle_in
from tunesmith.apps.studio.history import History
from tunesmith.models.store import LocalModel
from tunesmith.runs import Run

pytestmark = pytest.mark.timeout(900)
SOON = 120_000  # milliseconds; the machine may be busy
STEPS = 12
QUESTION = "Write a long story about a smith and his anvil."
MALICE = """\
<script>window.owned = 1</script> <img src=x onerror="window.owned = 1">
<iframe srcdoc="<script>parent.owned = 1</script>"></iframe>
[click](javascript:window.owned=1) ![pixel](http://127.0.0.1:{port}/pixel.png) ![p][one]

[one]: http://127.0.0.1:{port}/pixel.png
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def server(
    home: Path, smollm2: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    monkeypatch.delenv("TUNESMITH_LANG")  # the browser's language decides
    settle_in(home, smollm2)
    running = Server(tmp_path, free_port())
    yield running
    running.close()
    for path in tmp_path.glob("runs/*/config.toml"):
        if (trainer := Run(path.parent).trainer) is not None:
            os.kill(trainer, signal.SIGKILL)


def visit(browser: Browser, address: str, locale: str = "en-US") -> Page:
    page = browser.new_context(locale=locale, accept_downloads=True).new_page()
    page.set_default_timeout(SOON)
    page.goto(address)
    return page


def go(page: Page, name: str) -> None:
    page.get_by_test_id("stTopNavLink").filter(has_text=re.compile(f"{name}$")).click()
    expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible(timeout=SOON)


def test_from_nothing_to_ones_own_assistant(
    browser: Browser, server: Server, tmp_path: Path
) -> None:
    page = visit(browser, server.address)
    expect(page.get_by_text("How can I help?")).to_be_visible(timeout=SOON)
    write_identity(page)
    train(page, server, tmp_path)
    compare(page)
    chat(page, server)


def write_identity(page: Page) -> None:
    go(page, "Data")
    page.get_by_label("Name", exact=True).fill("Anvil")
    page.get_by_label("Author", exact=True).fill("Smith")
    page.get_by_role("button", name="Write it down").click()
    all_good = re.compile(r"(\d+) of \1 rows can be trained on\.")
    expect(page.get_by_text(all_good)).to_be_visible(timeout=SOON)


def train(page: Page, server: Server, folder: Path) -> None:
    """To the end, with the page's server killed on the way."""
    go(page, "Train")
    page.get_by_text("All settings").click()
    for name, value in (
        ("replay", 0),
        ("probes", 0),
        ("max steps", STEPS),
        ("warmup steps", 1),
        ("eval every", 4),
    ):
        field = page.get_by_role("spinbutton", name=name)
        field.fill(str(value))
        field.press("Enter")
    page.get_by_role("button", name="Begin").click()
    shown = page.get_by_text(re.compile(rf"step \d+ of {STEPS}"))
    expect(shown).to_be_visible(timeout=SOON)
    first = drawn(page, "step 1 of")
    (run,) = (Run(path.parent) for path in folder.glob("runs/*/config.toml"))
    server.kill()
    trainer, seen = run.trainer, len(run.events())
    assert trainer is not None
    wait_until(lambda: len(run.events()) > seen, "the training ended with the page")
    assert run.trainer == trainer
    server.start()
    page.reload()
    expect(shown).to_be_visible(timeout=SOON)
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    wait_until(lambda: run.trainer is None, "the training does not end", seconds=600)
    expect(page.get_by_text("Trained. Talk to it")).to_be_visible(timeout=SOON)
    assert drawn(page, f"step {STEPS} of") != first
    losses = [event["loss"] for event in run.events() if event["event"] == "Step"]
    assert losses[-1] < losses[0] / 2


def drawn(page: Page, words: str) -> bytes:
    """The loss curve as it looks beside these words."""
    page.get_by_text(re.compile("step \\d+ of")).wait_for()
    return page.get_by_test_id("stVegaLiteChart").first.screenshot()


def compare(page: Page) -> None:
    go(page, "Compare")
    page.get_by_label("Question", exact=True).fill("Who are you?")
    page.get_by_role("button", name="Ask both").click()
    expect(page.locator("ins").first).to_be_visible(timeout=SOON)


def chat(page: Page, server: Server) -> None:
    """An answer is stopped; a refresh and a second tab show it all; it is taken away as a file."""
    page.get_by_test_id("stTopNavLink").filter(has_text=re.compile("Chat$")).click()
    ask(page, "Who are you?")
    expect(page.get_by_text("tokens/s")).to_have_count(1, timeout=SOON)
    page.get_by_text("Settings", exact=True).click()
    page.get_by_text("Adapter", exact=True).click()  # the base tells longer stories
    ask(page, QUESTION)
    answers = page.get_by_test_id("stChatMessage")
    expect(answers).to_have_count(5)
    expect(answers.last).to_have_text(re.compile(r"\w+ \w+ \w+"), timeout=SOON)
    page.get_by_role("button", name="Stop").click()
    assert idle_after(server) < 2
    expect(page.get_by_text("stopped")).to_be_visible(timeout=SOON)
    said = spoken(page)
    address = page.url
    page.reload()
    expect(page.get_by_text("stopped")).to_be_visible(timeout=SOON)
    assert spoken(page) == said
    second = page.context.new_page()
    second.goto(address)
    expect(second.get_by_text("stopped")).to_be_visible(timeout=SOON)
    second.close()
    page.get_by_test_id("stSidebar").get_by_text("more_vert").first.click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as JSON").click()
    exported = json.loads(download.value.path().read_text("utf-8"))
    turns = [one for one in exported["messages"] if one["role"] != "system"]
    assert [one["content"] for one in turns if one["role"] == "user"] == ["Who are you?", QUESTION]
    assert all(one["content"] for one in turns)


def spoken(page: Page) -> list[str]:
    messages = page.get_by_test_id("stChatMessage").all()
    return [one.get_by_test_id("stMarkdown").first.inner_text() for one in messages]


def ask(page: Page, text: str) -> None:
    page.get_by_test_id("stChatInputTextArea").fill(text)
    page.keyboard.press("Enter")


def idle_after(server: Server) -> float:
    """Seconds until the engine uses no processor time any more."""
    begun, used = time.monotonic(), server.engine_time()
    while True:
        time.sleep(0.1)
        now = server.engine_time()
        if now - used < 0.02:
            return time.monotonic() - begun - 0.1
        assert time.monotonic() < begun + 5, "the engine goes on after Stop"
        used = now


def test_ten_visitors_at_once_each_get_their_own_whole_answer(
    browser: Browser, server: Server
) -> None:
    words = ("iron", "snow", "bread", "river", "lamp", "horse", "paper", "cloud", "salt", "bell")
    pages = [visit(browser, server.address) for _ in words]
    for page in pages:
        page.get_by_test_id("stChatInputTextArea").wait_for()
    for page, word in zip(pages, words, strict=True):
        ask(page, f"What is {word}? One sentence.")
    said = []
    for page in pages:
        expect(page.get_by_text("tokens/s")).to_have_count(1, timeout=2 * SOON)
        said.append(page.get_by_test_id("stChatMessage").last.inner_text().lower())
        page.context.close()
    their_own = [word in answer for word, answer in zip(words, said, strict=True)]
    assert sum(their_own) >= 7, said  # so small a model may speak of frozen water and not of snow


@pytest.mark.parametrize(
    ("locale", "first"), [("en-US", "How can I help?"), ("zh-CN", "有什么可以帮您的？")]
)
def test_what_a_model_says_cannot_act(
    locale: str, first: str, browser: Browser, server: Server, home: Path, smollm2: LocalModel
) -> None:
    history = History(home / "conversations.sqlite")
    id = history.begin("Say <script>window.owned = 1</script>", smollm2.name, MALICE)
    text = MALICE.format(port=free_port())
    history.add(id, "user", text)
    history.add(id, "assistant", text)
    asked: list[str] = []
    context = browser.new_context(locale=locale, accept_downloads=True)
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{server.address}/?c={id}")
    expect(page.get_by_text(first)).to_be_visible(timeout=SOON)
    expect(page.get_by_text("click").last).to_be_visible(timeout=SOON)
    for link in page.get_by_test_id("stChatMessage").locator("a").all():
        assert not (link.get_attribute("href") or "").startswith("javascript:")
    assert page.evaluate("window.owned") is None
    assert page.locator("[data-testid=stChatMessage] :is(script, img, iframe)").count() == 0
    page.get_by_test_id("stSidebar").get_by_text("more_vert").first.click()
    with page.expect_download() as download:
        page.get_by_role("button", name=re.compile("Markdown")).click()
    exported = context.new_page()
    exported.on("request", lambda request: asked.append(request.url))
    exported.goto(f"file://{download.value.path()}")
    assert exported.evaluate("window.owned") is None
    assert not any("pixel" in url for url in asked)
    context.close()


def test_no_page_needs_torch_in_its_process(browser: Browser, server: Server) -> None:
    page = visit(browser, server.address)
    expect(page.get_by_text("How can I help?")).to_be_visible(timeout=SOON)
    for name in ("Compare", "Data", "Train", "Models", "Runs"):
        go(page, name)
    maps = Path(f"/proc/{server.process.pid}/maps")
    if maps.exists():
        assert "libtorch" not in maps.read_text()
    page.context.close()
