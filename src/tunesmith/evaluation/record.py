"""A comparison as JSON and back, so that it can be kept in its run."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from tunesmith.data.messages import Message
from tunesmith.errors import RunError
from tunesmith.evaluation.compare import Answer, Compared, Question
from tunesmith.evaluation.verdict import Course, Share, Verdict
from tunesmith.language import t
from tunesmith.runs import Run


def as_json(results: Iterable[Compared | Verdict]) -> dict[str, Any]:
    """Pairs and verdict, with what the verdict says in words."""
    found = list(results)
    verdict = next(item for item in found if isinstance(item, Verdict))
    words = {
        "learning": verdict.learning,
        "keeping": verdict.keeping,
        "stops": verdict.stops,
        "passed": verdict.passed,
        "causes": verdict.causes,
    }
    return {
        "pairs": [asdict(item) for item in found if isinstance(item, Compared)],
        "verdict": asdict(verdict) | words,
    }


def recorded(run: Run) -> tuple[list[Compared], Verdict] | None:
    """What was kept of the run's last comparison, or None.

    Raises:
        RunError: It cannot be read.
    """
    content = run.comparison
    if content is None:
        return None
    try:
        return [_pair(item) for item in content["pairs"]], _verdict(content["verdict"])
    except (LookupError, TypeError, AttributeError, ValueError):
        raise RunError(
            t("{path}/compare.json does not hold a comparison; `tunesmith compare {path}` makes "
              "it anew.", path=run.path)
        ) from None  # fmt: skip


def _pair(item: dict[str, Any]) -> Compared:
    asked = item["question"]
    messages = tuple(Message(turn["role"], str(turn["content"])) for turn in asked["messages"])
    reference = asked["reference"]
    return Compared(
        Question(
            asked["kind"],
            str(asked["text"]),
            messages,
            None if reference is None else str(reference),
        ),
        _answer(item["base"]),
        _answer(item["tuned"]),
        learnt=_mark(item["learnt"]),
        kept=_mark(item["kept"]),
    )


def _answer(item: dict[str, Any]) -> Answer:
    return Answer(str(item["text"]), bool(item["ended"]))


def _mark(value: Any) -> bool | None:
    return None if value is None else bool(value)


def _share(item: dict[str, Any]) -> Share:
    return Share(int(item["count"]), int(item["total"]))


def _verdict(item: dict[str, Any]) -> Verdict:
    kl, agreement, loss = (item.get(name) for name in ("kl", "agreement", "loss"))
    likeness = item.get("likeness")
    return Verdict(
        learnt=_share(item["learnt"]),
        kept=_share(item["kept"]),
        ended=_share(item["ended"]),
        similarity=float(item["similarity"]),
        looping=int(item.get("looping", 0)),
        kl=None if kl is None else float(kl),
        agreement=None if agreement is None else float(agreement),
        loss=None if loss is None else float(loss),
        likeness=(float(likeness[0]), float(likeness[1])) if likeness else None,
        course=_course(item["course"]) if item.get("course") else None,
    )


def _course(item: dict[str, Any]) -> Course:
    fit = item["fit"]
    return Course(
        int(item["samples"]),
        int(item["questions"]),
        int(item["contradicted"]),
        int(item["endless"]),
        tuple(map(float, item["losses"])),
        None if fit is None else float(fit),
    )
