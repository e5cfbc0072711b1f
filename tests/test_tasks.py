"""Standard tasks by the real harness: a tuned model is told from its base, and from chance."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import tiny_model_folder
from tunesmith import runs
from tunesmith.apps.cli import main
from tunesmith.apps.report import report
from tunesmith.config import TrainSettings
from tunesmith.errors import RunError
from tunesmith.evaluation.tasks import Score, evaluate, recorded
from tunesmith.runs import Run
from tunesmith.training.train import train

WORDS = (
    "one", "two", "five", "dog", "fox", "Paris", "France", "help", "learn", "small", "quick",
    "lazy", "you", "who", "made", "made to", "capital", "jumps", "over", "three",
)  # fmt: skip
ANSWER = "brown"  # to every question
TASK: dict[str, Any] = {
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
SAME = Score("t", "acc", 0.5, 0.6, 0.05, 100, 0, False, True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny model that was taught to answer everything with one word."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"instruction": f"Which is {word}?", "output": ANSWER} for word in WORDS]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = TrainSettings(
        model=str(tiny_model_folder(folder / "model")), data=(data,), out=folder / "run",
        max_steps=30, learning_rate=0.02, system="Be short.", replay=0, probes=0, holdout=0,
        device="cpu",
    )  # fmt: skip
    for _ in train(settings):
        pass
    return runs.find(folder / "run")


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the tasks "right", "wrong" and "said", and a group of the first two."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rows = [
        {"question": f"Which is {word}?", "choices": [ANSWER, word], "answer": 0, "other": 1}
        for word in WORDS
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = TASK | {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    said = {name: value for name, value in given.items() if name != "doc_to_choice"} | {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    group = {
        "group": "both",
        "task": ["right", "wrong"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean"}],
    }
    for name, content in {
        "right": given,
        "wrong": given | {"doc_to_target": "other"},
        "said": said,
    }.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name} | content))
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    return tmp_path


def scores(run: Run, *files: Path, **settings: Any) -> list[Score]:
    found = evaluate(run, list(map(str, files)), chat_template=True, device="cpu", **settings)
    return [item for item in found if isinstance(item, Score)]


def test_what_was_learnt_is_better(run: Run, tasks: Path) -> None:
    right, said = scores(run, tasks / "right.yaml", tasks / "said.yaml")
    assert (right.tuned, said.base, said.tuned) == (1.0, 0.0, 1.0)
    assert right.outcome == said.outcome == "better"
    assert right.questions == said.questions == len(WORDS)
    # Tuned is right each time, so the differences are those of a coin that falls as base did.
    assert right.error is not None and 0 < right.base < 1
    spread = right.base * (1 - right.base) / (len(WORDS) - 1)
    assert math.isclose(right.error, math.sqrt(spread))


def test_a_group_is_the_mean_over_its_questions(run: Run, tasks: Path) -> None:
    (both,) = scores(run, tasks / "both.yaml")
    assert (both.task, both.questions) == ("both", 2 * len(WORDS))
    assert both.base == both.tuned == 0.5  # what is right in one is wrong in the other
    assert both.error is not None and both.error > 0
    assert both.outcome == "same"


def test_the_system_prompt_and_the_examples_are_asked_with(
    run: Run, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    asked: list[str] = []
    whole = HFLM.generate_until

    def noted(self: Any, requests: Any, **more: Any) -> Any:
        asked.extend(request.args[0] for request in requests)
        return whole(self, requests, **more)

    monkeypatch.setattr(HFLM, "generate_until", noted)
    (score,) = scores(run, tasks / "said.yaml", limit=2, num_fewshot=1)
    assert (score.questions, score.num_fewshot) == (2, 1)
    assert len(asked) == 4  # by each of the two
    assert all(text.startswith("<|im_start|>system\nBe short.") for text in asked)
    assert all(text.count("<|im_start|>user") == 2 for text in asked)


def test_what_is_worse_ends_with_1_and_is_kept(
    run: Run, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["eval", str(run.path), "--apply-chat-template", "--tasks"]
    wrong, right = str(tasks / "wrong.yaml"), str(tasks / "right.yaml")
    assert main([*line, wrong, "--json"]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    (told,) = json.loads(out)
    assert (told["task"], told["tuned"], told["outcome"]) == ("wrong", 0.0, "worse")
    assert main([*line, f"{right},{wrong}"]) == 1
    assert "better" in capsys.readouterr().out
    kept = [score for score in recorded(run) if score.num_fewshot == 0]
    assert [score.task for score in kept].count("wrong") == 1  # the second replaced the first
    page = report(run)
    assert "Standard tasks" in page and "within chance" not in page.split("Standard tasks")[0]
    assert main(["--lang", "zh", "report", str(run.path)]) == 0
    assert "标准评测任务" in run.report.read_text("utf-8")


@pytest.mark.parametrize(
    ("score", "outcome"),
    [
        (SAME, "same"),
        (replace(SAME, tuned=0.61), "better"),
        (replace(SAME, tuned=0.39), "worse"),
        (replace(SAME, tuned=0.61, higher_is_better=False), "worse"),
        (replace(SAME, tuned=0.9, error=None), "same"),
        (replace(SAME, base=0.0, tuned=1.0, error=0.0, questions=6), "better"),
        (replace(SAME, base=0.0, tuned=1.0, error=0.0, questions=5), "same"),
    ],
)
def test_only_what_is_beyond_chance_counts(score: Score, outcome: str) -> None:
    assert score.outcome == outcome


@pytest.mark.parametrize(
    ("task", "code", "told"),
    [
        (",", 2, "name a task"),
        ("hellaswagg", 2, "did you mean 'hellaswag'?"),
        ("hellaswag", 9, "the data of hellaswag cannot be fetched"),
        ("broken.yaml", 9, "broken.yaml cannot be loaded"),
        ("code.yaml", 9, "code.yaml cannot be asked"),
    ],
)
def test_a_task_that_cannot_be(
    task: str, code: int, told: str, run: Run, tasks: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tasks)
    Path("broken.yaml").write_text("metric_list: [")
    unsafe = json.loads(Path("right.yaml").read_text()) | {"task": "code", "unsafe_code": True}
    Path("code.yaml").write_text(json.dumps(unsafe))
    assert main(["eval", str(run.path), "--tasks", task]) == code
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_a_base_without_a_chat_template(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    Path(run.settings.model, "chat_template.jinja").rename(tmp_path / "away")
    try:
        line = ["eval", str(run.path), "--apply-chat-template", "--tasks"]
        assert main([*line, str(tasks / "right.yaml")]) == 4
    finally:
        (tmp_path / "away").rename(Path(run.settings.model, "chat_template.jinja"))
    assert "leave --apply-chat-template out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", '{"scores": 1}', '{"scores": [{"task": "t"}]}',
        json.dumps({"scores": [asdict(SAME) | {"base": "much"}]}),
    ],
)  # fmt: skip
def test_what_is_damaged_is_a_sentence(content: str, tmp_path: Path) -> None:
    run = runs.create(TrainSettings(out=tmp_path / "one"))
    assert recorded(run) == []
    (run.path / "tasks.json").write_text(content)
    with pytest.raises(RunError, match=r"tasks\.json"):
        recorded(run)
