"""The command line: what it prints, what it returns, and one sentence for each mistake."""

import json
import os
import pty
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny_models import tiny_model_folder
from tunesmith import __version__
from tunesmith.apps import help as help_pages
from tunesmith.apps.cli import main
from tunesmith.apps.menu import COMMANDS, find_command
from tunesmith.apps.parser import parse
from tunesmith.data.checks import check
from tunesmith.errors import UsageError
from tunesmith.language import current_language

ROOT = Path(__file__).parent.parent
TUNESMITH = [
    sys.executable,
    "-c",
    "import sys; from tunesmith.apps.cli import main; sys.exit(main())",
]

Answer = tuple[int, str, str]
Cli = Callable[..., Answer]


@pytest.fixture
def cli(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Cli:
    """Run a command line in an empty working directory: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str | Path) -> Answer:
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"instruction": f"What is {n} + 1?", "output": f"It is {n + 1}."}) + "\n"
            for n in range(12)
        )
    )
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("tiny"))


def test_without_words_the_commands_are_listed(cli: Cli) -> None:
    code, out, _ = cli()
    assert code == 0
    assert all(name in out for name in COMMANDS)
    assert cli("--help") == cli("-h") == (0, out, "")


def test_the_version_is_told(cli: Cli) -> None:
    assert cli("--version") == (0, f"tunesmith {__version__}\n", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_page_in_both_languages(name: str, cli: Cli) -> None:
    for place in (0, len(name.split())):  # the flag may stand before the command or after it
        words = name.split()
        words.insert(place, "--help")
        code, english, _ = cli(*words, "--lang", "en")
        assert code == 0
        assert COMMANDS[name].summary in " ".join(english.split())
    code, chinese, _ = cli(*name.split(), "--help", "--lang=zh")
    assert code == 0
    described = re.sub(r"tunesmith .*|--[\w-]+|[A-Z_]{2,}|hf:\S+|modelscope:\S+", "", chinese)
    assert not re.search(r"\b[a-z]+ [a-z]+ [a-z]+ [a-z]+\b", described), described


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_each_command_is_accepted(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import shlex

    program, *words = shlex.split(COMMANDS[name].example)
    assert program == "tunesmith"
    assert find_command(words) == name
    parse(name, words[len(name.split()) :])


@pytest.mark.parametrize("width", [40, 60, 88, 200])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_help_fits_the_terminal(
    width: int, language: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    _, out, _ = cli("train", "--help", "--lang", language)
    options = [
        line for line in out.splitlines() if not re.match(r" *(--|Usage|Example|用法|例如)", line)
    ]
    assert max(map(help_pages.display_width, options)) <= min(width, help_pages.WIDEST)


def test_wrapping_loses_nothing_and_keeps_punctuation_with_its_word() -> None:
    text = "把一个很长的中文句子，连同 some English words，折成几行；标点不会落到行首。"
    for columns in range(8, 60):
        lines = list(help_pages.wrap(text, columns))
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert not any(line[0] in "，；。" for line in lines)


def test_a_group_alone_shows_its_commands(cli: Cli) -> None:
    code, out, _ = cli("data")
    assert code == 2
    assert "data identity" in out
    assert "tunesmith train" not in out


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("trian", "there is no command 'trian'; did you mean 'train'?"),
        ("data chek x", "there is no command 'data chek'; did you mean 'data check'?"),
        ("xyzzy", "`tunesmith --help` lists all."),
        ("train --lorar 3", "there is no --lorar; did you mean --lora-r?"),
        ("train --lora-r", "--lora-r needs a value."),
        ("train --lora-r eight", "--lora-r must be a whole number, not 'eight'."),
        ("train --epochs many", "--epochs must be a number, not 'many'."),
        ("train --lora-r 1 --lora-r 2", "--lora-r is given twice."),
        ("train --lora-r 0", "--lora-r 0 is out of range; allowed: 1 … 1024."),
        ("train --scheduler up", "--scheduler must be one of cosine, linear, constant, not 'up'."),
        ("train nothing.toml", "cannot read recipe nothing.toml"),
        ("train --resume", "--resume needs the run to go on with"),
        ("pull", "MODEL is missing."),
        ("pull a b", "do not know what to do with 'b'."),
        ("data identity --name A -o x.jsonl", "--author is missing."),
        ("data check", "tunesmith data check FILE…"),
        ("data convert x.json -o y.jsonl --holdout 1.5", "--holdout 1.5 is out of range"),
        ("data preview x.json --model m --rows 0", "--rows 0 is out of range; allowed: 1 …"),
        ("chat --temperature -1", "--temperature -1.0 is out of range; allowed: 0 … 2."),
        ("chat --top-p nan", "--top-p nan is out of range"),
        ("chat --max-tokens 0", "--max-tokens 0 is out of range"),
        ("data check gone.jsonl", "gone.jsonl does not exist"),
        ("data convert --out x.jsonl", "tunesmith data convert FILE…"),
        ("models --lang fr", "--lang must be one of en, zh, not 'fr'."),
        ("models --lang", "--lang must be one of en, zh, not ''."),
    ],
)
def test_a_wrong_line_gets_one_sentence_and_code_2(line: str, sentence: str, cli: Cli) -> None:
    code, out, err = cli(*line.split())
    assert (code, out) == (2, "")
    assert err.startswith("tunesmith: ")
    assert err.count("\n") == 1
    assert sentence in err


def test_mistakes_are_explained_in_chinese_too(cli: Cli) -> None:
    code, _, err = cli("train", "--lorar", "3", "--lang", "zh")
    assert code == 2
    assert "没有 --lorar 这个选项；是不是 --lora-r？" in err


def test_the_language_of_one_call_does_not_outlive_it(cli: Cli) -> None:
    before = current_language()
    cli("--lang", "zh")
    assert current_language() == before


def test_debug_adds_the_traceback(cli: Cli) -> None:
    plain = cli("data", "check", "gone.jsonl")
    code, _, err = cli("--debug", "data", "check", "gone.jsonl")
    assert code == plain[0]
    assert "Traceback" in err
    assert err.endswith(plain[2])


def test_a_refusal_of_the_system_is_one_sentence(cli: Cli, rows: Path) -> None:
    code, _, err = cli("data", "convert", rows, "-o", rows / "below-a-file.jsonl")
    assert code == 1
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_words_after_two_dashes_are_not_flags(cli: Cli) -> None:
    code, _, err = cli("data", "check", "--", "--help")
    assert code == 2
    assert "--help does not exist" in err


def test_data_goes_from_identity_to_check_to_convert(cli: Cli) -> None:
    assert cli("data", "identity", "--name", "小明", "--author", "小红", "-o", "me.jsonl")[0] == 0
    code, out, _ = cli("data", "check", "me.jsonl")
    assert code == 0
    assert re.search(r"(\d+) of \1 rows", out)
    code, _, err = cli("data", "identity", "--name", "B", "--author", "C", "-o", "me.jsonl")
    assert code == 2
    assert "exists already" in err
    assert "小明" in Path("me.jsonl").read_text("utf-8")
    assert cli("data", "convert", "me.jsonl", "-o", "all.jsonl", "--holdout", "0.2")[0] == 0
    parts = [check([Path(name)]).rows for name in ("all.jsonl", "all.held-out.jsonl")]
    assert sum(parts) == check([Path("me.jsonl")]).rows
    assert parts[1] > 0


def test_bad_rows_are_named_and_give_code_1(cli: Cli, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "hi", "output": "[red]{{NAME}}\\u001b[31m"}\n{broken\n')
    code, out, _ = cli("data", "check", bad)
    assert code == 1
    assert f"{bad}:1" in out
    assert f"{bad}:2" in out
    assert "\x1b" not in out
    code, out, _ = cli("data", "check", bad, "--json")
    report = json.loads(out)
    assert code == 1
    assert {finding["place"]["line"] for finding in report["findings"]} == {1, 2}
    assert report["usable"] == 0


def test_preview_marks_what_is_trained_and_writes_a_page(cli: Cli, rows: Path, tiny: Path) -> None:
    code, out, _ = cli("data", "preview", rows, "--model", tiny, "--rows", "1")
    assert code == 0
    assert "⟦It is 1.<|im_end|>⟧" in out
    assert "What is 1 + 1?" not in out
    assert "✂" in cli("data", "preview", rows, "--model", tiny, "--max-length", "9")[1]
    assert cli("data", "preview", rows, "--model", tiny, "--html", "page.html")[0] == 0
    assert "It is 1" in re.sub("<[^>]*>", "", Path("page.html").read_text("utf-8"))
    assert cli("data", "preview", rows, "--model", tiny, "--html", "page.html")[0] == 2


def test_models_lists_the_catalog_and_removes_only_what_is_here(cli: Cli) -> None:
    code, out, _ = cli("models")
    assert code == 0
    assert "smollm2-135m" in out
    assert "qwen2-7b-instruct" in out
    listed = json.loads(cli("models", "--json")[1])
    assert listed["installed"] == []
    assert "smollm2-135m" in {entry["name"] for entry in listed["catalog"]}
    code, _, err = cli("models", "remove", "smollm2-135m")
    assert code == 4
    assert "smollm2-135m is not on this machine" in err


def test_training_prints_its_story_and_saves_its_curves(cli: Cli, rows: Path, tiny: Path) -> None:
    line = _training(rows, tiny, steps=4)
    code, out, err = cli(*line)
    assert (code, err) == (0, "")
    for part in ("learning rate", "4/4", "held-out loss", "● held out", "run/adapter"):
        assert part in out
    assert Path("run/loss.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path("run/loss.svg").read_text()
    code, _, err = cli(*line)
    assert code == 6
    assert "run exists already" in err


def test_a_run_is_compared_with_its_base_and_talked_to(cli: Cli, tiny: Path) -> None:
    cli("data", "identity", "--name", "小明", "--author", "小红", "-o", "me.jsonl")
    assert cli(*_training(Path("me.jsonl"), tiny, steps=2))[0] == 0
    Path("ask.txt").write_text("你是谁？\nWhat is 1 + 1?\n", encoding="utf-8")
    code, out, err = cli("compare", "run", "--ask", "ask.txt", "--json")
    assert (code, err) == (0, "")
    assert [pair["question"]["text"] for pair in json.loads(out)["pairs"]] == [
        "你是谁？", "What is 1 + 1?",
    ]  # fmt: skip
    code, out, err = cli("chat", "run", "--once", "你是谁？", "--max-tokens", "4")
    assert code == 0
    assert "Traceback" not in err


def test_training_as_json_is_one_event_a_line(cli: Cli, rows: Path, tiny: Path) -> None:
    code, out, _ = cli(*_training(rows, tiny, steps=3), "--json")
    assert code == 0
    events = [json.loads(line) for line in out.splitlines()]
    assert events[0]["event"] == "Planned"
    assert [e["step"] for e in events if e["event"] == "Step"] == [1, 2, 3]
    assert events[-1] == events[-1] | {"event": "Finished", "step": 3}


def test_training_stopped_by_ctrl_c_says_how_to_go_on(
    rows: Path, tiny: Path, tmp_path: Path, home: Path
) -> None:
    line = [*TUNESMITH, *map(str, _training(rows, tiny, steps=100_000))]
    process = subprocess.Popen(
        line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/checkpoints/step-0000[1-9]*/manifest.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ("tunesmith: training was stopped; go on with: tunesmith train --resume run\n")


def test_on_a_terminal_the_bar_moves_and_control_characters_stay_inert(
    rows: Path, tiny: Path, tmp_path: Path, home: Path
) -> None:
    line = [*TUNESMITH, *map(str, _training(rows, tiny, steps=4)), "--lang", "zh"]
    screen = _on_a_terminal(line, tmp_path)
    assert "4/4" in screen
    assert "token/秒" in screen
    assert "目前最好" in screen
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "hi", "output": "x", "a[red]\\u001b]0;owned\\u0007": 1}\n')
    screen = _on_a_terminal([*TUNESMITH, "data", "check", str(bad)], tmp_path)
    assert "[red]" in screen
    assert "\x1b]0;" not in screen


def _on_a_terminal(line: list[str], folder: Path) -> str:
    """What the command writes when its stdout is a terminal."""
    main_end, its_end = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(line, cwd=folder, stdout=its_end, stderr=its_end, env=environment)
    os.close(its_end)
    written = b""
    while True:
        try:
            piece = os.read(main_end, 65536)
        except OSError:  # Linux says so when the other end is closed
            piece = b""
        if not piece:
            break
        written += piece
    os.close(main_end)
    process.wait(timeout=60)
    return written.decode(errors="replace")


def test_a_reader_that_leaves_early_is_met_with_silence(home: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*TUNESMITH, "models"], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_chinese_on_a_terminal_without_unicode_does_not_crash(home: Path) -> None:
    done = subprocess.run(
        [*TUNESMITH, "--lang", "zh"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0
    assert b"smollm2" in done.stdout or b"train" in done.stdout


def test_the_reference_is_what_help_prints() -> None:
    reference = runpy.run_path(str(ROOT / "docs" / "generate_cli.py"))["reference"]
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == reference(), "run: make docs"


def test_an_unknown_word_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UsageError):
        find_command(["--frobnicate"])


def _training(rows: Path, model: Path, *, steps: int) -> list[str | Path]:
    return [
        "train",
        "--model",
        model,
        "--data",
        rows,
        "--out",
        "run",
        "--replay",
        "0",
        "--probes",
        "0",
        "--max-steps",
        str(steps),
        "--batch-size",
        "4",
        "--eval-every",
        "2",
        "--save-every",
        "2",
        "--holdout",
        "0.2",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
