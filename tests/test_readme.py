"""The documents tell the truth: whatever they tell a reader to type or to open is tried here.

Commands run in the order of the page, in one empty folder, against a local hub. A model with tiny
random weights stands for the 7B, and for the packaged one in the demo.
"""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers_browser import Server, free_port
from tests.hub_server import HubServer
from tests.tiny_models import SPECIAL_TOKENS, tiny_model_folder
from tunesmith.apps.cli import main
from tunesmith.apps.inert import inert
from tunesmith.apps.menu import find_command
from tunesmith.language import set_language, t

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "README.zh.md", "docs/how-it-works.md")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
FENCE = "```"


@dataclass(frozen=True)
class Block:
    """A fenced block. One with a file name is the content of that file."""

    language: str
    file: str | None
    text: str


def blocks(page: str) -> Iterator[Block]:
    lines = iter((ROOT / page).read_text("utf-8").splitlines())
    for line in lines:
        if line.startswith(FENCE):
            language, _, file = line.removeprefix(FENCE).partition(" ")
            text = "".join(inner + "\n" for inner in iter(lambda: next(lines), FENCE))
            yield Block(language, file or None, text)


def commands(block: Block) -> list[str]:
    lines = block.text.splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def inline_code(page: str) -> set[str]:
    text = re.sub(rf"^{FENCE}.*?^{FENCE}$", "", (ROOT / page).read_text("utf-8"), flags=re.M | re.S)
    return {" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)}


@pytest.mark.parametrize("page", PAGES)
def test_no_block_is_of_a_kind_that_would_not_run(page: str) -> None:
    kinds = {block.language for block in blocks(page) if block.file is None}
    assert "sh" in kinds
    assert kinds <= {"sh", "python", "text"}
    for block in blocks(page):
        if block.language == "text" and block.file is None:
            assert not re.search(r"^(\$ )?(tunesmith|pip|git) ", block.text, re.M)


def test_both_readmes_give_the_same_commands_code_and_files() -> None:
    english, chinese = (
        [block for block in blocks(page) if block.language != "text" or block.file]
        for page in ("README.md", "README.zh.md")
    )
    assert english == chinese


@pytest.mark.parametrize(("page", "language"), [("README.md", "en"), ("README.zh.md", "zh")])
def test_the_transcript_has_the_steps_that_the_demo_prints(page: str, language: str) -> None:
    source = (ROOT / "src/tunesmith/apps/demo.py").read_text("utf-8")
    steps = re.findall(r'_explain\(\s*(\d),\s*t\("([^"]+)"\)', source)
    shown = (ROOT / page).read_text("utf-8").split("<!-- demo -->")[1].split("<!-- /demo -->")[0]
    context = copy_context()
    context.run(set_language, language)
    expected = [f"━━ {number}. {context.run(t, title)} ━━" for number, title in steps]
    assert re.findall(r"^━━ .*$", shown, re.M) == expected
    assert len(expected) == 5


@pytest.mark.parametrize("page", PAGES)
def test_what_the_text_mentions_exists(page: str) -> None:
    flags = re.findall(r"--[\w-]+", (ROOT / "docs/cli.md").read_text("utf-8"))
    source = ROOT / "src/tunesmith"
    for code in inline_code(page):
        first, *rest = code.split()
        if first == "tunesmith" and rest:
            assert find_command(rest), code
        elif first == "make":
            assert make(rest[0]), code
        elif first.startswith("--"):
            assert first in flags, code
        elif first.endswith(".py"):
            assert (source / first).is_file(), code
        elif first.endswith("/") and first not in ("runs/", "adapter/"):
            assert (source / first).is_dir() or (ROOT / first).is_dir(), code


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text("utf-8"))
    for target in targets:
        assert ((ROOT / page).parent / target).exists(), target


def test_all_that_is_to_be_typed_works(reader: "Reader") -> None:
    reader.follow("README.md")
    reader.follow("docs/how-it-works.md")
    with_tunesmith, without_tunesmith = reader.run_python()
    assert (with_tunesmith + without_tunesmith).strip()
    greedy = ["--temperature", "0", "--max-tokens", "64", "--once", "Who are you?"]
    assert inert(without_tunesmith) == reader.tunesmith(["chat", "runs/me", *greedy])
    drawn = next(block.text for block in blocks("README.md") if block.text.startswith("runs/me/"))
    for name in re.findall(r"^  (\S+)", drawn, re.M):
        assert (Path("runs/me") / name).exists(), name
    row = json.loads(Path("runs/me/held_out.jsonl").read_text("utf-8").splitlines()[0])
    assert "Momo" in row["messages"][-1]["content"]


@dataclass
class Reader:
    """Does what a page says, from top to bottom."""

    model: Path
    screen: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    scripts: list[str]

    def follow(self, page: str) -> None:
        for block in blocks(page):
            if block.file is not None:
                Path(block.file).write_text(block.text, "utf-8")
            elif block.language == "python":
                self.scripts.append(block.text)
            elif block.language == "sh":
                for command in commands(block):
                    self.type(command)

    def type(self, command: str) -> None:
        """Run one command line; one of a kind that is not known here fails."""
        match shlex.split(command):
            case ["git", "clone", url]:
                self.clone(url)
            case ["cd", folder]:
                self.monkeypatch.chdir(folder)
            case ["make", target]:
                self.make(target)
            case ["pip", "install", *words]:
                self.pip(words)
            case ["tunesmith", "demo", *words]:
                self.tunesmith(["demo", *words, "--model", str(self.model)])
            case ["tunesmith", "studio"]:
                Server(Path.cwd(), free_port()).close()
            case ["tunesmith", *words]:
                self.tunesmith(words)
            case _:
                pytest.fail(f"no test knows how to run: {command}")

    def clone(self, url: str) -> None:
        """What a page uses of a clone lies in its place."""
        assert PROJECT["urls"]["Documentation"] == f"{url}#readme"
        folder = Path(url.rpartition("/")[2])
        folder.mkdir()
        for name in ("examples", "Makefile", "pyproject.toml"):
            (folder / name).symlink_to(ROOT / name)

    def make(self, target: str) -> None:
        """The target ends in the command it stands for, and all its programs are installed.

        The demo itself has a test of its own, and `make test` cannot run within itself.
        """
        last = {"demo": "tunesmith demo", "test": "python -m pytest"}
        lines = [line for line in make(target) if line.startswith(".venv/bin/")]
        assert lines[-1].startswith(f".venv/bin/{last[target]}")
        for line in lines:
            program = Path(line.split()[0]).name
            assert (Path(sys.executable).parent / program).exists(), program

    def pip(self, words: list[str]) -> None:
        """pip takes the line, and the names are those of packages that are installed here."""
        offline = ["--dry-run", "--no-index", "--no-deps", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "install", *words, *offline]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "already satisfied" in done.stdout

    def tunesmith(self, words: list[str]) -> str:
        """Run it here, with a question on stdin; returns what it printed."""
        self.monkeypatch.setattr(sys, "stdin", io.StringIO("Who are you?\n"))
        code = main(words)
        out, err = self.screen.readouterr()
        # Random weights learn nothing worth the name, and `compare` and `eval` say so.
        bad = {"compare": "not learnt", "eval": "worse"}.get(words[0])
        expected = 1 if bad is not None and bad in out else 0
        assert code == expected, f"{shlex.join(words)}\n{out}\n{err}"
        assert out or words[0] == "chat", words
        return out

    def run_python(self) -> list[str]:
        """What each Python block prints. One process runs them all: torch takes long to load."""
        names = [f"block_{number}.py" for number in range(len(self.scripts))]
        for name, text in zip(names, self.scripts, strict=True):
            Path(name).write_text(text, "utf-8")
        code = "import runpy, sys\nfor name in sys.argv[1:]: runpy.run_path(name); print('\\0')"
        command = [sys.executable, "-c", code, *names]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        *printed, rest = done.stdout.split("\0\n")
        assert not rest
        return printed


@pytest.fixture
def reader(
    home: Path,
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Reader:
    """Someone in an empty folder, whose hub has Qwen2-7B-Instruct."""
    model = brief(tiny_model_folder(tmp_path / "tiny", "qwen2", layers=1))
    hub.publish("Qwen/Qwen2-7B-Instruct", model)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    desk = tmp_path / "desk"
    desk.mkdir()
    monkeypatch.chdir(desk)
    return Reader(model, capsys, monkeypatch, [])


def brief(model: Path) -> Path:
    """Make the end of an answer likelier than other tokens: random answers seldom end."""
    from safetensors.torch import load_file, save_file

    file = model / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"][SPECIAL_TOKENS.index("<|im_end|>")] *= 3
    save_file(weights, file, {"format": "pt"})
    return model


def make(target: str) -> list[str]:
    """What `make target` would run."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", "--no-print-directory", "-C", str(ROOT), target]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()
