"""Pictures of every page in both languages for the READMEs: `make screenshots`.

Trains an identity first (three minutes on two cores), in a folder that is thrown away.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from urllib.error import URLError

from playwright.sync_api import Browser, Page, expect, sync_playwright

TUNESMITH = str(Path(sys.executable).with_name("tunesmith"))
OUT = Path(__file__).with_name("images")
LOCALES = {"en": "en-US", "zh": "zh-CN"}
QUESTIONS = {"en": "Who are you?", "zh": "你是谁？"}
ASK_BOTH = {"en": "Ask both", "zh": "同时提问"}
QUESTION = {"en": "Question", "zh": "问题"}
MODELS = {"en": "Models", "zh": "模型"}
WIDTH, HEIGHT = 1180, 860
SOON = 60_000  # milliseconds


def main() -> None:
    """Prepare a folder, serve it, and take the pictures."""
    OUT.mkdir(exist_ok=True)
    with TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        server = subprocess.Popen([TUNESMITH, "studio", "--port", str(port)], cwd=folder)
        try:
            address = f"http://127.0.0.1:{port}"
            wait(address)
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(
                    executable_path=which("chromium") or which("google-chrome"),
                    args=["--no-sandbox"],
                )
                for language in LOCALES:
                    shoot(browser, address, language)
        finally:
            server.terminate()
            server.wait()


def prepare(folder: Path) -> None:
    """A home of its own, data, and a run trained on it."""
    os.environ["TUNESMITH_HOME"] = str(folder / "home")
    run("pull", "smollm2-135m", at=folder)
    run(
        "data", "identity", "--name", "Anvil", "--author", "Smith", "-o", "data/me.jsonl", at=folder
    )
    run("train", "--data", "data/me.jsonl", "--out", "runs/anvil", at=folder)


def run(*words: str, at: Path) -> None:
    """A command, as typed."""
    subprocess.run([TUNESMITH, *words], cwd=at, check=True)


def wait(address: str) -> None:
    """Until the page answers."""
    while True:
        try:
            urllib.request.urlopen(f"{address}/_stcore/health").close()
        except URLError:
            time.sleep(0.2)
        else:
            return


def shoot(browser: Browser, address: str, language: str) -> None:
    """One picture of each page."""
    context = browser.new_context(
        locale=LOCALES[language], viewport={"width": WIDTH, "height": HEIGHT}
    )
    page = context.new_page()
    page.set_default_timeout(SOON)
    page.goto(address)
    page.get_by_test_id("stChatInputTextArea").fill(QUESTIONS[language])
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("stChatMessage")).to_have_count(3)
    expect(page.get_by_text("token").last).to_be_visible()
    take(page, "chat", language)
    links = page.get_by_test_id("stTopNavLink")
    names = ("chat", "compare", "models", "data", "train", "runs")
    for number, name in enumerate(names):
        if name == "chat":
            continue
        links.nth(number).click()
        page.get_by_role("heading").first.wait_for()
        if name == "compare":
            page.get_by_label(QUESTION[language], exact=True).fill(QUESTIONS[language])
            page.get_by_role("button", name=ASK_BOTH[language]).click()
            page.locator("ins").first.wait_for()
        take(page, name, language)
    context.close()


def take(page: Page, name: str, language: str) -> None:
    """Once nothing moves any more."""
    page.wait_for_timeout(2500)
    page.screenshot(path=OUT / f"{name}-{language}.png")


if __name__ == "__main__":
    main()
