"""Recipes: what they may say, and what is answered when they say it wrongly."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from tunesmith import runs
from tunesmith.apps.parser import arguments_of, parse
from tunesmith.config import TrainSettings, flag, read_recipe
from tunesmith.errors import RunError, UsageError

EXAMPLES = sorted(Path(__file__).parent.parent.joinpath("examples").glob("*.toml"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tmp_path / "recipe.toml"


def _parsed(*words: str | Path) -> TrainSettings:
    bound = parse("train", [str(word) for word in words])
    settings = bound.arguments.get("settings") or TrainSettings()
    assert isinstance(settings, TrainSettings)
    return settings


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_a_recipe(path: Path) -> None:
    assert read_recipe(path)
    assert _parsed(path) == TrainSettings(**read_recipe(path))


def test_the_tutorial_recipe_is_the_tutorial() -> None:
    settings = TrainSettings(**read_recipe(next(p for p in EXAMPLES if p.stem == "tutorial")))
    assert settings.lora_targets == (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    assert (settings.lora_r, settings.lora_alpha, settings.lora_dropout) == (8, 32, 0.1)
    assert (settings.batch_size, settings.micro_batch_tokens) == (4 * 4, 4 * 384)
    assert (settings.epochs, settings.learning_rate, settings.max_length) == (3, 1e-4, 384)


def test_values_get_the_types_of_the_settings(recipe: Path) -> None:
    recipe.write_text(
        'data = ["a.jsonl", "b.csv"]\nout = "runs/x"\nepochs = 2\nlora_targets = "all-linear"\n'
        'use_dora = true\nscheduler = "linear"\nmax_steps = 7\nlearning_rate = 1e-3\n'
    )
    values = read_recipe(recipe)
    assert values == {
        "data": (Path("a.jsonl"), Path("b.csv")),
        "out": Path("runs/x"),
        "epochs": 2.0,
        "lora_targets": ("all-linear",),
        "use_dora": True,
        "scheduler": "linear",
        "max_steps": 7,
        "learning_rate": 1e-3,
    }
    assert isinstance(values["epochs"], float)


def test_flags_win_over_the_recipe(recipe: Path) -> None:
    recipe.write_text("lora_r = 4\nuse_dora = true\nepochs = 5\ndata = ['a.jsonl']\n")
    settings = _parsed(recipe, "--lora-r", "16", "--no-use-dora", "--data", "b.jsonl", "c.jsonl")
    assert (settings.lora_r, settings.use_dora, settings.epochs) == (16, False, 5.0)
    assert settings.data == (Path("b.jsonl"), Path("c.jsonl"))


def test_a_flag_at_its_default_still_wins(recipe: Path) -> None:
    recipe.write_text("lora_r = 4\n")
    assert _parsed(recipe, "--lora-r", "8").lora_r == 8


@pytest.mark.parametrize("line", ["--resume RUN", "RUN --resume", "--out RUN --resume"])
def test_a_resumed_run_brings_its_own_settings(line: str, tmp_path: Path) -> None:
    begun = TrainSettings(out=tmp_path / "run", lora_r=4, data=(Path("a.jsonl"),), epochs=2.5)
    runs.create(begun)
    words = line.replace("RUN", str(begun.out)).split()
    assert _parsed(*words) == begun
    assert _parsed(*words, "--lora-r", "2") == replace(begun, lora_r=2)


def test_a_run_can_be_named_without_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs.create(TrainSettings(out=Path("runs/mine"), lora_r=4))
    for words in (["--resume", "mine"], ["--out", "mine", "--resume"]):
        assert _parsed(*words) == TrainSettings(out=Path("runs/mine"), lora_r=4)


def test_a_run_as_recipe_begins_a_new_run(tmp_path: Path) -> None:
    runs.create(TrainSettings(out=tmp_path / "run", lora_r=4))
    assert _parsed(tmp_path / "run", "--epochs", "1") == TrainSettings(lora_r=4, epochs=1.0)


def test_resuming_what_is_no_run_lists_the_runs(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="gone"):
        _parsed("--out", tmp_path / "gone", "--resume")


def test_what_a_run_writes_is_a_recipe(tmp_path: Path) -> None:
    settings = TrainSettings(out=tmp_path / "run", use_dora=True, learning_rate=3e-4)
    run = runs.create(settings)
    assert TrainSettings(**read_recipe(run.path / "config.toml")) == settings


def test_every_setting_is_a_flag_with_help() -> None:
    flags = {name: a.parameter.help for a in arguments_of("train") for name in a.names}
    for item in fields(TrainSettings):
        assert flags[flag(item.name)] == item.metadata["help"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("learning_rat = 1e-4", "learning_rat; did you mean learning_rate?"),
        ("lora-r = 8", "lora-r; did you mean lora_r?"),
        ("zzz = 1", "no setting is called zzz; `tunesmith train --help`"),
        ('lora_r = "8"', "lora_r must be a whole number, not '8'"),
        ("lora_r = 8.5", "lora_r must be a whole number, not 8.5"),
        ("lora_r = true", "lora_r must be a whole number, not True"),
        ('epochs = "many"', "epochs must be a number, not 'many'"),
        ("epochs = false", "epochs must be a number, not False"),
        ("use_dora = 1", "use_dora must be true or false, not 1"),
        ('gradient_checkpointing = "yes"', "gradient_checkpointing must be true or false"),
        ("model = 7", "model must be a string, not 7"),
        ("data = [1, 2]", "data must be a list of strings, not [1, 2]"),
        ('scheduler = "cosin"', "scheduler must be one of cosine, linear, constant, not 'cosin'"),
        ("[lora]\nr = 8", "no setting is called lora"),
        ("lora_r = 0", "--lora-r 0 is out of range; allowed: 1 … 1024"),
        ("learning_rate = nan", "--learning-rate nan is out of range"),
        ("lora_r = ", "is not TOML"),
    ],
)
def test_a_wrong_recipe_is_named_with_the_reason(text: str, sentence: str, recipe: Path) -> None:
    recipe.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_recipe(recipe)
    assert sentence in str(caught.value)
    assert str(recipe) in str(caught.value)


def test_a_recipe_from_windows_is_read(recipe: Path) -> None:
    recipe.write_bytes("\ufeffmodel = \"a\"\r\nsystem = '你好'\r\n".encode())
    assert read_recipe(recipe) == {"model": "a", "system": "你好"}


def test_bytes_that_are_not_text_are_refused(recipe: Path) -> None:
    recipe.write_bytes(b"\xff\xfem\x00")
    with pytest.raises(UsageError, match="is not TOML"):
        read_recipe(recipe)


@pytest.mark.parametrize("value", [0, -1, 1025, 10**9])
def test_bounds_hold_for_settings_made_in_code(value: int) -> None:
    with pytest.raises(UsageError, match="out of range"):
        TrainSettings(lora_r=value)


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.1])
def test_bounds_of_numbers_include_not_a_number(bad: Any) -> None:
    with pytest.raises(UsageError, match="--lora-dropout"):
        TrainSettings(lora_dropout=bad)
