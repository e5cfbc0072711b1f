"""`eval`: standard tasks for base and tuned, as a table."""

import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from tunesmith.apps.commands import Json
from tunesmith.config import require_range
from tunesmith.errors import UsageError
from tunesmith.language import t

if TYPE_CHECKING:
    from tunesmith.evaluation.tasks import Score


def evaluate(
    run: Annotated[str, Parameter(help="A run: its folder, or its name under runs/.")],
    /,
    *,
    tasks: Annotated[
        list[str],
        Parameter(help="Names that lm-evaluation-harness knows, or paths of its YAML files."),
    ],
    limit: Annotated[
        int | None, Parameter(help="Only so many questions of each task. Default: all.")
    ] = None,
    num_fewshot: Annotated[
        int | None, Parameter(help="Solved examples before each question. Default: the task's own.")
    ] = None,
    apply_chat_template: Annotated[
        bool,
        Parameter(
            help="Put each question as a user's turn, behind the run's system prompt.", negative=()
        ),
    ] = False,
    batch_size: Annotated[int, Parameter(help="Sequences in a forward pass.")] = 8,
    json: Json = False,
) -> int:
    """Print what base and tuned score; 1 if the tuned model is worse at one, beyond chance."""
    from tunesmith import runs
    from tunesmith.apps.terminal import console, print_json, table
    from tunesmith.evaluation.tasks import Asking
    from tunesmith.evaluation.tasks import evaluate as scores_of

    for flag, value, least in (
        ("--limit", limit, 1), ("--num-fewshot", num_fewshot, 0), ("--batch-size", batch_size, 1),
    ):  # fmt: skip
        if value is not None:
            require_range(flag, value, least)
    names = [name for given in tasks for name in given.split(",") if name]
    if not names:
        raise UsageError(t("name a task: tunesmith eval runs/demo --tasks hellaswag"))
    who = {"base": t("base"), "tuned": t("tuned")}
    scores: list[Score] = []
    with _bars():
        for item in scores_of(
            runs.find(run),
            names,
            limit=limit,
            num_fewshot=num_fewshot,
            chat_template=apply_chat_template,
            batch_size=batch_size,
        ):
            if not isinstance(item, Asking):
                scores.append(item)
            elif not json:
                print(f"{item.task}: {who[item.who]}", flush=True)
    if json:
        print_json([asdict(score) | _said(score) for score in scores])
    else:
        console().print(table(score_titles(), score_rows(scores)))
    return int(any(score.outcome == "worse" for score in scores))


def score_titles() -> list[str]:
    """The heads of the columns of `score_rows`."""
    return [
        t("task"), t("metric"), t("questions"), t("examples"), t("put as"), t("base"), t("tuned"),
        t("difference"), "",
    ]  # fmt: skip


def score_rows(scores: "Sequence[Score]") -> Iterator[list[str]]:
    """Each score as cells."""
    words = {"better": t("better"), "worse": t("worse"), "same": t("within chance")}
    for score in scores:
        error = "" if score.error is None else f" ± {score.error:.4f}"
        yield [
            score.task,
            score.metric,
            f"{score.questions:,}",
            str(score.num_fewshot),
            t("a turn") if score.chat_template else t("text"),
            f"{score.base:.4f}",
            f"{score.tuned:.4f}",
            f"{score.difference:+.4f}{error}",
            words[score.outcome],
        ]


def _said(score: "Score") -> dict[str, Any]:
    return {"difference": score.difference, "outcome": score.outcome}


def _bars() -> AbstractContextManager[object]:
    """The harness draws progress bars on stderr: for a person, not into a file."""
    if sys.stderr.isatty():
        return contextlib.nullcontext()
    return contextlib.redirect_stderr(io.StringIO())
