"""Standard tasks: lm-evaluation-harness puts the same questions to base and tuned.

A benchmark's error bar tells how its score would change with other questions. Base and tuned
answer the same ones, so what counts is the error of their difference, question by question: it is
smaller, and tells what tuning did from what chance did.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from numbers import Real
from operator import sub
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from tunesmith.engines.hf import open_model
from tunesmith.errors import EvaluationError, ModelError, RunError, UsageError
from tunesmith.evaluation.compare import trained_system
from tunesmith.language import t
from tunesmith.models.adapter import check_adapter
from tunesmith.models.store import LocalModel, locate
from tunesmith.models.tokenizer import load_tokenizer, tokenizer_folder
from tunesmith.runs import Run

Who = Literal["base", "tuned"]
CERTAIN = 2.0  # standard errors: chance alone differs by more once in twenty times
FEWEST = 6  # questions: of fewer, even all falling the same way may be chance
SEED = 1234  # the harness's own, by which solved examples are drawn
RESAMPLES = 1000  # for metrics that are not a mean over questions


@dataclass(frozen=True)
class Asking:
    """A task begins for one of the two."""

    task: str
    who: Who


@dataclass(frozen=True)
class Score:
    """One metric of a task.

    `error` is the standard error of `tuned - base`, or None where it is not known: for a mean over
    questions that of the paired differences, else of two scores that are not paired.
    """

    task: str
    metric: str
    base: float
    tuned: float
    error: float | None
    questions: int
    num_fewshot: int
    chat_template: bool
    higher_is_better: bool

    @property
    def difference(self) -> float:
        """How much higher the tuned model scores."""
        return self.tuned - self.base

    @property
    def outcome(self) -> Literal["better", "worse", "same"]:
        """What the difference says beyond chance; "same" where it says nothing."""
        few = self.questions < FEWEST
        if few or self.error is None or abs(self.difference) <= CERTAIN * self.error:
            return "same"
        return "better" if (self.difference > 0) == self.higher_is_better else "worse"

    @property
    def asked(self) -> tuple[object, ...]:
        """What was asked and how."""
        return self.task, self.metric, self.num_fewshot, self.chat_template


def evaluate(
    run: Run,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    batch_size: int = 8,
    device: str = "auto",
) -> Iterator[Asking | Score]:
    """Ask base and tuned the tasks one after another, greedily and with the same settings.

    Args:
        run: A finished run.
        tasks: Names that lm-evaluation-harness knows, or paths of its YAML files.
        limit: Only so many questions of each task.
        num_fewshot: Solved examples before each question; None leaves it to the task.
        chat_template: Whether each question is put as a user's turn, behind the run's system
            prompt, rather than as plain text.
        batch_size: Sequences in a forward pass.
        device: As for `open_model`.

    Raises:
        UsageError: lm-evaluation-harness is not installed, or it knows no such task.
        RunError: The run has no adapter yet.
        EvaluationError: A task's data cannot be fetched, or the task refuses the model.
        TunesmithError: The model or the adapter does not load.
    """
    system = trained_system(run)
    model = locate(run.settings.model)
    check_adapter(run.adapter, model)
    manager = _manager(tasks)
    loaded = {name: _load(manager, name, num_fewshot) for name in tasks}
    harness = _harness(model, run, batch_size=batch_size, device=device, chat=chat_template)
    settings = {
        "limit": limit,
        "apply_chat_template": chat_template,
        "fewshot_as_multiturn": chat_template,
        "system_instruction": system if chat_template else None,
    }
    for name, task in loaded.items():
        found: dict[Who, Mapping[str, Any]] = {}
        for who in ("base", "tuned"):
            yield Asking(name, who)
            with harness.model.disable_adapter() if who == "base" else nullcontext():
                found[who] = _ask(harness, name, task, settings)
        for score in _scores(task, found, chat_template):
            _record(run, score)
            yield score


def recorded(run: Run) -> list[Score]:
    """What was kept of the tasks the run was asked.

    Raises:
        RunError: It cannot be read.
    """
    try:
        return [_score(kept) for kept in run.tasks.get("scores", [])]
    except (LookupError, TypeError, ValueError):
        raise RunError(
            t("{path}/tasks.json does not hold scores; delete it.", path=run.path)
        ) from None


def _score(kept: Mapping[str, Any]) -> Score:
    return Score(
        task=str(kept["task"]),
        metric=str(kept["metric"]),
        base=float(kept["base"]),
        tuned=float(kept["tuned"]),
        error=None if kept["error"] is None else float(kept["error"]),
        questions=int(kept["questions"]),
        num_fewshot=int(kept["num_fewshot"]),
        chat_template=bool(kept["chat_template"]),
        higher_is_better=bool(kept["higher_is_better"]),
    )


def _record(run: Run, new: Score) -> None:
    """Keep it, instead of an older one that was asked the same."""
    others = [score for score in recorded(run) if score.asked != new.asked]
    run.write_tasks({"scores": [asdict(score) for score in (*others, new)]})


def _manager(tasks: Sequence[str]) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UsageError(
            t("standard tasks need lm-evaluation-harness: pip install 'tunesmith[eval]'")
        ) from None
    files = [Path(name) for name in tasks if Path(name).is_file()]
    return TaskManager(
        include_path=list({file.resolve().parent for file in files}),
        include_defaults=len(files) < len(tasks),  # reading all of the harness's takes seconds
    )


def _load(manager: Any, name: str, num_fewshot: int | None) -> Any:
    """The task, or a group's, with its data: the harness's `TaskDict`."""
    known = manager.task_index
    if Path(name).is_file():
        name = next((own for own in known if known[own].yaml_path == Path(name).resolve()), name)
    elif name not in known:
        close = get_close_matches(name, manager.all_tasks, n=1)
        if close:
            raise UsageError(
                t("there is no task {word!r}; did you mean {close!r}?", word=name, close=close[0])
            )
        raise UsageError(
            t("there is no task {word!r}; `lm-eval ls tasks` lists all, and a YAML file of your "
              "own can be given by its path.", word=name)
        )  # fmt: skip
    try:
        loaded = manager.load([name])
    except ConnectionError as error:
        raise EvaluationError(
            t("the data of {name} cannot be fetched ({reason}); check the network, or set "
              "HF_ENDPOINT to a mirror.", name=name, reason=_line(error))
        ) from error  # fmt: skip
    except Exception as error:  # a task may be any code
        raise EvaluationError(
            t("the task {name} cannot be loaded ({reason}).", name=name, reason=_line(error))
        ) from error
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0:  # a task that says 0 cannot be asked otherwise
            task.set_config("num_fewshot", own or 0 if num_fewshot is None else num_fewshot)
        task.set_fewshot_seed(SEED)
    return loaded


def _harness(model: LocalModel, run: Run, *, batch_size: int, device: str, chat: bool) -> Any:
    """The tuned model as the harness takes it; its adapter can be switched off."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    if chat and load_tokenizer(model).chat_template is None:
        raise ModelError(
            t("{name} has no chat template; leave --apply-chat-template out.", name=model.name)
        )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(model), local_files_only=True)
    tuned = open_model(model, run.adapter, device)
    return HFLM(pretrained=tuned, tokenizer=tokenizer, batch_size=batch_size)


def _ask(harness: Any, name: str, task: Any, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    from lm_eval.evaluator import evaluate as ask

    try:
        found: Mapping[str, Any] = ask(harness, task, bootstrap_iters=RESAMPLES, **settings)
    except Exception as error:  # a task may be any code
        raise EvaluationError(
            t("the task {name} cannot be asked ({reason}).", name=name, reason=_line(error))
        ) from error
    return found


def _scores(task: Any, found: Mapping[Who, Mapping[str, Any]], chat: bool) -> Iterator[Score]:
    base, tuned = found["base"], found["tuned"]
    for name, members in _scopes(task, base).items():
        for key, value in base["results"][name].items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            yield Score(
                task=name,
                metric=metric if kind == "none" else key,
                base=float(value),
                tuned=float(tuned["results"][name][key]),
                error=_error(found, name, members, key),
                questions=sum(base["n-samples"][member]["effective"] for member in members),
                num_fewshot=max(base["n-shot"][member] for member in members),
                chat_template=chat,
                higher_is_better=base["higher_is_better"][name].get(metric) is not False,
            )


def _scopes(task: Any, results: Mapping[str, Any]) -> dict[str, list[str]]:
    """What is scored, and the tasks it is made of: a group that has a score, or each task."""
    group = next((name for name in task["groups"] if name in results.get("groups", {})), None)
    members = list(task["tasks"])
    return {group: members} if group else {member: [member] for member in members}


def _error(
    found: Mapping[Who, Mapping[str, Any]], name: str, members: Sequence[str], key: str
) -> float | None:
    """The standard error of the difference; see `Score`."""
    results: list[Mapping[str, Any]] = [found[who]["results"][name] for who in ("base", "tuned")]
    base, tuned = (_values(found[who], members, key) for who in ("base", "tuned"))
    if _is_mean((base, tuned), [float(result[key]) for result in results]):
        differences: list[float] = list(map(sub, tuned, base))
        return stdev(differences) / math.sqrt(len(differences))
    errors = [result.get(key.replace(",", "_stderr,")) for result in results]
    known = [float(error) for error in errors if isinstance(error, float) and math.isfinite(error)]
    return math.hypot(*known) if len(known) == len(results) else None


def _values(results: Mapping[str, Any], members: Sequence[str], key: str) -> list[float]:
    """What each question scored, in the order of the questions, where each has a number."""
    metric, _, kind = key.partition(",")
    samples = [
        sample
        for member in members
        for sample in sorted(results["samples"][member], key=lambda sample: sample["doc_id"])
        if sample["filter"] == kind
    ]
    return [float(sample[metric]) for sample in samples if isinstance(sample.get(metric), Real)]


def _is_mean(values: Sequence[Sequence[float]], scores: Sequence[float]) -> bool:
    """Whether each score is the mean of its values, for the same two or more questions."""
    base, tuned = values
    return len(base) == len(tuned) >= 2 and all(
        math.isclose(fmean(own), score, rel_tol=1e-6, abs_tol=1e-9)
        for own, score in zip(values, scores, strict=True)
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
