"""A run on one page that needs nothing else: verdict, curves, answers, data, settings, cost."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from tunesmith.apps.chart import HEIGHT, LEFT, RIGHT, WIDTH, Chart, Line, chart
from tunesmith.apps.comparison import MARKS, advice, counted, words
from tunesmith.apps.differences import marked
from tunesmith.apps.eval_command import score_rows, score_titles
from tunesmith.apps.facts import Facts, facts_of
from tunesmith.apps.figures import duration, size
from tunesmith.apps.inert import inert
from tunesmith.apps.mask import trained_samples
from tunesmith.apps.story import differences, shown
from tunesmith.config import TrainSettings, flag, settings_to
from tunesmith.errors import RunError
from tunesmith.evaluation.compare import Compared
from tunesmith.evaluation.tasks import recorded
from tunesmith.evaluation.verdict import Share, Verdict
from tunesmith.language import current_language, t
from tunesmith.runs import Run

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_TEXT = 2000  # characters of a question or an answer
MOST_OF_ALL = 400_000  # characters of all of them, so that the page is small enough to send
GOOD = {"learnt": "good", "partly": "fair", "not": "bad"} | {
    "kept": "good", "drifted": "fair", "damaged": "bad",
}  # fmt: skip

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Pair:
    """A question and both answers as they are shown; `base` and `tuned` are HTML."""

    kind: str
    question: str
    has_system: bool
    reference: str | None
    base: Markup
    tuned: Markup
    base_ended: bool
    tuned_ended: bool
    mark: str
    right: bool


def report(run: Run) -> str:
    """The page of one run.

    Raises:
        RunError: A file of the run is broken.
    """
    facts = facts_of(run)
    data = run.data
    rows = _data(data, facts)
    pairs = _pairs(facts.pairs)
    return _page(
        "report.html",
        title=inert(run.name),
        facts=facts,
        base=inert(str(facts.settings["model"])),
        pills=_pills(facts.verdict),
        counted=list(counted(facts.verdict)) if facts.verdict else [],
        advice=advice(facts.verdict) if facts.verdict else "",
        path=inert(shlex.quote(str(run.path))),
        failure=_failure(facts),
        headline=_headline(facts),
        loss=_loss(facts),
        moved=chart([Line("KL", facts.figures.moved, dotted=True)]),
        sections=_sections(pairs),
        left_out=len(facts.pairs) - len(pairs),
        tasks=_tasks(run),
        samples=[Markup(sample) for sample in trained_samples(run, data)],
        data=rows,
        settings=_settings(facts.settings),
        environment=_environment(facts),
        cost=_cost(facts),
    )


def side_by_side(runs: Sequence[Run]) -> str:
    """The page of several runs, a column each.

    Raises:
        RunError: A file of a run is broken.
    """
    every = [facts_of(run) for run in runs]
    names = [run.name for run in runs]
    labels = names if len(set(names)) == len(names) else [str(run.path) for run in runs]
    numbered = {str(place): facts.settings for place, facts in enumerate(every)}
    settings = [
        (row[t("setting")], [inert(row[place]) for place in numbered])
        for row in differences(numbered)
    ]
    lines = [
        Line(inert(label), facts.figures.curves.held_out, dotted=True)
        for label, facts in zip(labels, every, strict=True)
    ]
    return _page(
        "runs.html",
        title=" · ".join(map(inert, labels)),
        labels=list(map(inert, labels)),
        outcome=_outcome(every),
        settings=settings,
        loss=chart(lines),
        unasked=[inert(shlex.quote(str(f.run.path))) for f in every if f.verdict is None],
    )


def _page(template: str, **content: Any) -> str:
    return _templates().get_template(template).render(
        language=current_language(), width=WIDTH, height=HEIGHT, left=LEFT, right=WIDTH - RIGHT,
        **content,
    )  # fmt: skip


@cache
def _templates() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("tunesmith.apps"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["t"] = t
    return made


def _pills(verdict: Verdict | None) -> Rows:
    """The verdict's words, each with how good it is; none where there was nothing to learn."""
    if verdict is None or not verdict.learnt.total:
        return []
    stops = "good" if verdict.stops else "bad"
    kinds = (GOOD[verdict.learning], GOOD[verdict.keeping], stops)
    return list(zip(words(verdict), kinds, strict=True))


def _failure(facts: Facts) -> str:
    """Why it ended, if the last thing it did was to fail."""
    last = facts.story.events[-1] if facts.story.events else {}
    return _short(str(last.get("reason", ""))) if last.get("event") == "Failed" else ""


def _headline(facts: Facts) -> Rows:
    figures, first, best = facts.figures, facts.figures.first, facts.figures.best
    rows = []
    if best is not None:
        before = f"{first.loss:.3f} → " if first is not None else ""
        rows.append((t("held-out loss"), f"{before}{best.loss:.3f}"))
        if best.kl is not None:
            rows.append((t("moved, nats"), f"{best.kl:.3f}"))
    if figures.steps:
        rows += [
            (t("steps"), f"{figures.step:,} / {figures.steps:,}"),
            (t("time"), duration(figures.seconds)),
        ]
    return rows


def _loss(facts: Facts) -> Chart | None:
    curves = facts.figures.curves
    return chart(
        [
            Line(t("training"), curves.training),
            Line(t("held out"), curves.held_out, dotted=True),
        ]
    )


def _pairs(every: Sequence[Compared]) -> list[Pair]:
    """The pairs as they are shown, as many as fit on a page."""
    found, length = [], 0
    for pair in map(_pair, every):
        length += sum(map(len, (pair.question, pair.reference or "", pair.base, pair.tuned)))
        if length > MOST_OF_ALL:
            break
        found.append(pair)
    return found


def _sections(pairs: Sequence[Pair]) -> list[tuple[str, list[Pair]]]:
    titles = {
        "identity": t("About itself"),
        "held_out": t("Held-out rows"),
        "neutral": t("What it should not change"),
        "asked": t("Questions of one's own"),
    }
    found = [
        (title, [pair for pair in pairs if pair.kind == kind]) for kind, title in titles.items()
    ]
    return [(title, own) for title, own in found if own]


def _pair(pair: Compared) -> Pair:
    base, tuned = marked(_short(pair.base.text), _short(pair.tuned.text))
    right = pair.learnt if pair.learnt is not None else pair.kept
    reference = pair.question.reference
    return Pair(
        kind=pair.question.kind,
        question=_short(pair.question.text),
        has_system=pair.question.has_system,
        reference=None if reference is None else _short(reference),
        base=Markup(base),
        tuned=Markup(tuned),
        base_ended=pair.base.ended,
        tuned_ended=pair.tuned.ended,
        mark=MARKS[right],
        right=bool(right),
    )


def _tasks(run: Run) -> tuple[list[str], list[list[str]]]:
    """Standard tasks as a table: its heads and its rows."""
    return score_titles(), [[inert(cell) for cell in row] for row in score_rows(recorded(run))]


def _short(text: str) -> str:
    return inert(text if len(text) <= MOST_TEXT else text[:MOST_TEXT] + " …")


def _data(data: dict[str, Any], facts: Facts) -> Rows:
    """What `data.json` and the plan tell of the data.

    Raises:
        RunError: `data.json` is not what training writes.
    """
    planned = facts.story.last("Planned")
    try:
        rows = [(str(file), str(sha256)) for file, sha256 in data["files"].items()]
        rows += [
            (t("samples"), f"{data['samples']:,}"),
            (t("held out"), f"{data['held_out']:,}"),
            (t("neutral, mixed in"), f"{planned['replay']:,}" if planned else "–"),
            (t("tokens"), _tokens(planned)),
            (t("cut at --max-length"), f"{data['cut']:,}"),
            (t("dropped: nothing to train on"), f"{data['dropped']:,}"),
            (t("system prompt"), str(data["system"] or "–")),
            (t("tokens and masks, SHA-256"), str(data["fingerprint"])),
            (t("base model, SHA-256"), str(data["model"]["sha256"])),
            (t("chat template, SHA-256"), str(data["template"])),
        ]
    except (LookupError, TypeError, ValueError, AttributeError):
        raise RunError(
            t("{file} is not what training writes.", file=facts.run.path / "data.json")
        ) from None
    return [(inert(name), _short(value)) for name, value in rows]


def _tokens(planned: dict[str, Any]) -> str:
    if not planned:
        return "–"
    return t("{all:,}, {trained:,} trained on",
             all=planned["tokens"], trained=planned["trained_tokens"])  # fmt: skip


def _settings(own: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Every setting: its flag, its value, and whether it differs from the default."""
    default = settings_to(TrainSettings())
    names = [item.name for item in fields(TrainSettings) if item.name != "out"]
    return [
        (flag(name), inert(shown(own.get(name)) or "–"), own.get(name) != default.get(name))
        for name in names
    ]


def _environment(facts: Facts) -> Rows:
    """What the run was made with; empty for a run that did not record it."""
    names: dict[str, str] = {
        "system": t("system"), "processor": t("processor"), "threads": t("threads"), "gpu": "GPU",
    }  # fmt: skip
    found: Any = facts.story.last("Started").get("environment")
    if not isinstance(found, dict) or not found:
        return []
    return [
        (inert(names.get(name) or str(name)), inert(str(value))) for name, value in found.items()
    ]


def _cost(facts: Facts) -> Rows:
    figures, planned = facts.figures, facts.story.last("Planned")
    if not figures.steps:
        return []
    rows = [
        (t("time of all steps"), duration(figures.seconds)),
        (t("tokens read"), f"{figures.tokens:,}"),
        (t("tokens a second"), f"{figures.tokens / (figures.seconds or 1e-9):,.0f}"),
        (t("peak memory"), size(figures.memory)),
    ]
    if planned:
        rows.append((t("device"), f"{planned['device']}, {planned['dtype']}"))
        rows.append((t("trainable"), f"{planned['trainable_parameters']:,}"))
    return [(name, inert(value)) for name, value in rows]


def _outcome(every: Sequence[Facts]) -> list[tuple[str, list[str]]]:
    """What came of each run, a row for each figure."""
    columns = [dict(_column(facts)) for facts in every]
    return [(name, [column[name] for column in columns]) for name in columns[0]]


def _column(facts: Facts) -> Iterator[tuple[str, str]]:
    figures, best, verdict = facts.figures, facts.figures.best, facts.verdict
    yield t("base"), inert(str(facts.settings.get("model", "")))
    yield t("begun"), f"{facts.story.begun:%Y-%m-%d %H:%M}"
    yield t("state"), facts.story.state
    yield t("verdict"), " · ".join(word for word, _ in _pills(verdict)) or "–"
    yield t("learnt"), _share(verdict.learnt if verdict else None)
    yield t("kept"), _share(verdict.kept if verdict else None)
    yield t("stops"), _share(verdict.ended if verdict else None)
    yield t("held-out loss"), "–" if best is None else f"{best.loss:.3f}"
    yield t("moved, nats"), "–" if best is None or best.kl is None else f"{best.kl:.3f}"
    yield t("steps"), f"{figures.step:,} / {figures.steps:,}" if figures.steps else "–"
    yield t("time of all steps"), duration(figures.seconds) if figures.steps else "–"
    yield t("peak memory"), size(figures.memory) if figures.steps else "–"


def _share(share: Share | None) -> str:
    return "–" if share is None or not share.total else f"{share.count} / {share.total}"
