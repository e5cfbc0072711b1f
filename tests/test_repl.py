"""The terminal chat, in a real terminal and in pipes."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.helpers_chat import Terminal, saying
from tests.helpers_data import conversations
from tunesmith.apps.inert import inert
from tunesmith.models.store import LocalModel

TUNESMITH = str(Path(sys.executable).with_name("tunesmith"))
ATTACK = "\x1b]0;pw\x07\x9b!"  # sets the window title, then begins another sequence


@pytest.fixture(scope="module")
def attacker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saying(tmp_path_factory.mktemp("model") / "attacker", ATTACK)


def piped(*words: str, stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    command = [TUNESMITH, "--lang", "en", "chat", *words]
    return subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=120)


def command(model: Path, *words: str) -> Sequence[str]:
    return [TUNESMITH, "--lang", "en", "chat", str(model), "--temperature", "0", *words]


def test_ctrl_c_stops_the_answer_and_the_next_question_works(
    smollm2: LocalModel, tmp_path: Path
) -> None:
    file = tmp_path / "talk.jsonl"
    with Terminal(command(smollm2.path, "--max-tokens", "3000")) as terminal:
        terminal.until("How can I help?")
        terminal.until("> ")
        terminal.type("Tell me a long story about a fox.\n")
        terminal.until("\n")
        terminal.until(" ")
        terminal.type("\x03")
        terminal.until("Stopped.")
        terminal.until("> ")
        terminal.type("Say hi.\n")
        terminal.until("> ")
        terminal.type(f"/save {file}\n")
        terminal.until("Saved to")
        terminal.press_at_prompt("\x03")
        terminal.until("Ctrl-C once more")
        terminal.press_at_prompt("\x03")
        assert terminal.process.wait(10) == 0
    (row,) = conversations(file)
    assert [message.role for message in row.messages] == ["user", "assistant"] * 2
    assert row.messages[1].content
    assert row.messages[3].content


def test_commands(smollm2: LocalModel) -> None:
    with Terminal(command(smollm2.path)) as terminal:
        for typed, shown in (
            ("/help", "/adapter on|off"),
            ("/system", "No system prompt is set"),
            ("/system Be brief.", "Be brief."),
            ("/system off", "No system prompt is set"),
            ("/adapter off", "No adapter is loaded"),
            ("/reset", "is forgotten"),
            ("/save", "Name a file"),
            ("/dance", "no command /dance"),
        ):
            terminal.until("> ")
            terminal.type(typed + "\n")
            terminal.until(typed.partition(" ")[0])
            terminal.until(shown)
        terminal.until("> ")
        terminal.type("/quit\n")
        assert terminal.process.wait(10) == 0


def test_an_answer_cannot_drive_the_terminal(attacker: Path, home: Path) -> None:
    with Terminal(command(attacker)) as terminal:
        terminal.until("> ")
        terminal.type("Hello\n")
        terminal.until("Hello")
        shown = terminal.until("> ")
    assert "�]0;pw��!" in shown
    assert not {"\x1b", "\x07", "\x9b"} & set(shown)


def test_what_is_harmless_is_shown_as_it_is() -> None:
    text = "Tab\t and line\nfull\u3000width，表情👩\u200d🔬 naïve"
    assert inert(text) == text
    assert inert("a\rb\x7fc\u202ed") == "a�b�c�d"


def test_chinese_and_ctrl_d(smollm2: LocalModel) -> None:
    words = [TUNESMITH, "--lang", "zh", "chat", str(smollm2.path)]
    with Terminal(words) as terminal:
        terminal.until("有什么可以帮您的？")
        terminal.press_at_prompt("\x04")
        assert terminal.process.wait(10) == 0


def test_once_prints_the_answer_and_nothing_else(smollm2: LocalModel) -> None:
    words = [str(smollm2.path), "--temperature", "0", "--max-tokens", "5"]
    once = piped(*words, "--once", "Say hi")
    assert once.returncode == 0
    assert once.stdout.strip()
    assert once.stderr.decode() == "The answer was cut after 5 tokens.\n"
    assert piped(*words, stdin=b"Say hi\n").stdout == once.stdout


def test_an_empty_pipe_is_refused(smollm2: LocalModel) -> None:
    done = piped(str(smollm2.path))
    assert done.returncode == 2
    assert b"--once" in done.stderr
    assert done.stdout == b""


def test_bytes_that_are_no_text_still_get_an_answer(attacker: Path, home: Path) -> None:
    done = piped(str(attacker), stdin=b"\xff\xfe?\n")
    assert done.returncode == 0
    assert "�]0;pw��!" in done.stdout.decode()
