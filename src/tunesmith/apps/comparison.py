"""Draws a comparison: each question with both answers side by side, then the verdict."""

from collections.abc import Iterable, Iterator

from rich import box
from rich.table import Table
from rich.text import Text

from tunesmith.apps.inert import inert
from tunesmith.apps.terminal import console, print_json
from tunesmith.evaluation.compare import Compared
from tunesmith.evaluation.record import as_json
from tunesmith.evaluation.verdict import Verdict
from tunesmith.language import t

MARKS = {True: "✓", False: "✗", None: ""}


def show_json(results: Iterable[Compared | Verdict]) -> int:
    """Print pairs and verdict as one JSON object; the exit code as `show`."""
    found = list(results)
    print_json(as_json(found))
    return max(_exit_code(item) for item in found if isinstance(item, Verdict))


def show(results: Iterable[Compared | Verdict]) -> int:
    """Print the answers as a table, then what they amount to; 1 if there was something to learn
    and it did not pass, else 0."""
    screen = console()
    table = Table(box=box.HORIZONTALS, show_lines=True, pad_edge=False)
    for title, ratio in ((t("question"), 2), (t("base"), 3), (t("tuned"), 3)):
        table.add_column(title, ratio=ratio, overflow="fold")
    table.add_column("", width=1)
    verdicts: list[Verdict] = []
    with screen.status(t("asking the model without and with what it learnt …")):
        for item in results:
            if isinstance(item, Verdict):
                verdicts.append(item)
            else:
                table.add_row(*_cells(item))
    screen.print(table)
    for verdict in verdicts:
        for line in verdict_lines(verdict):
            screen.print(line)
    return max(map(_exit_code, verdicts), default=0)


def _exit_code(verdict: Verdict) -> int:
    return 0 if verdict.passed or not verdict.learnt.total else 1


def _cells(pair: Compared) -> Iterator[Text]:
    question = inert(pair.question.text)
    note = t("with the system prompt") if pair.question.has_system else ""
    yield Text.assemble(question, ("\n" + note if note else "", "dim"))
    yield Text(inert(pair.base.text))
    yield Text(inert(pair.tuned.text))
    right = pair.learnt if pair.learnt is not None else pair.kept
    yield Text(MARKS[right], style="green" if right else "red")


def verdict_lines(verdict: Verdict) -> Iterator[str]:
    """What the answers amount to, a sentence a line."""
    yield from counted(verdict)
    if verdict.learnt.total:
        learning, keeping, stopping = words(verdict)
        yield t(
            "verdict: {learning}, {keeping}, {stopping}. {advice}",
            learning=learning, keeping=keeping, stopping=stopping, advice=advice(verdict),
        ).rstrip()  # fmt: skip


def counted(verdict: Verdict) -> Iterator[str]:
    """The figures, a sentence a line."""
    learnt, kept, ended = verdict.learnt, verdict.kept, verdict.ended
    if verdict.likeness is not None:
        yield from _learnt_from_rows(verdict)
    elif learnt.total:
        yield t(
            "learnt: {count} of {total} questions that it was not trained on",
            count=learnt.count,
            total=learnt.total,
        )
    if kept.total:
        yield t(
            "kept: {count} of {total} unrelated answers stay free of what was taught; "
            "they are {alike:.0%} like the base's",
            count=kept.count,
            total=kept.total,
            alike=verdict.similarity,
        )
    if ended.total:
        yield t(
            "ended: {count} of {total} answers stop by themselves",
            count=ended.count,
            total=ended.total,
        )
    if verdict.looping:
        yield t(
            "repeated: {count} of the {total} others say the same again and again",
            count=verdict.looping,
            total=ended.total - ended.count,
        )
    if verdict.kl is not None and verdict.agreement is not None:
        yield t(
            "moved: {kl:.3f} nats a token from the base at neutral answers; "
            "at {agreement:.0%} of the tokens both say the same",
            kl=verdict.kl,
            agreement=verdict.agreement,
        )


def _learnt_from_rows(verdict: Verdict) -> Iterator[str]:
    assert verdict.likeness is not None
    base, tuned = verdict.likeness
    if verdict.gained is not None and verdict.loss is not None:
        yield t(
            "learnt: rows that it was not trained on have a loss of {loss:.2f} nats a token, the "
            "base's {first:.2f}",
            loss=verdict.loss, first=verdict.loss + verdict.gained,
        )  # fmt: skip
    yield t(
        "answers: {count} of {total} are more like those of the rows than the base's; "
        "F1 of words and characters {tuned:.2f}, the base's {base:.2f}",
        count=verdict.learnt.count, total=verdict.learnt.total, tuned=tuned, base=base,
    )  # fmt: skip


def words(verdict: Verdict) -> tuple[str, str, str]:
    """Whether it learnt, whether it kept what it knew, whether it stops: a word for each."""
    learning = {"learnt": t("learnt"), "partly": t("partly learnt"), "not": t("not learnt")}
    keeping = {"kept": t("kept"), "drifted": t("drifted"), "damaged": t("damaged")}
    stopping = t("stops") if verdict.stops else t("does not stop")
    return learning[verdict.learning], keeping[verdict.keeping], stopping


def advice(verdict: Verdict) -> str:
    """Why they are not good and what to do about it; empty where all are."""
    return " ".join([*_causes(verdict), *_advice(verdict)])


def _causes(verdict: Verdict) -> Iterator[str]:
    """A sentence for each cause: its figures, and what to do."""
    course = verdict.course
    if course is None:
        return
    for cause in verdict.causes:
        match cause:
            case "few":
                yield t(
                    "{samples} samples ask only {questions} different questions: more phrasings.",
                    samples=course.samples, questions=course.questions,
                )  # fmt: skip
            case "contradicted":
                yield t(
                    "{count} of {samples} rows ask what another one answers otherwise: see "
                    "`tunesmith data check`, and keep one answer for each question.",
                    count=course.contradicted, samples=course.samples,
                )  # fmt: skip
            case "shuffled":
                yield t(
                    "Its answers do not follow from the questions ({fit:.2f} nats a token): see "
                    "with `tunesmith data preview` whether each stands beside its own question.",
                    fit=course.fit,
                )  # fmt: skip
            case "endless":
                yield t(
                    "In {count} of {samples} samples the end of the answer is not trained: raise "
                    "--max-length, or look at the masks with `tunesmith data preview`.",
                    count=course.endless, samples=course.samples,
                )  # fmt: skip
            case "rate":
                yield t(
                    "The held-out loss rose to {last:.2f} from the base's {first:.2f}: lower "
                    "--learning-rate.",
                    last=course.losses[-1], first=course.losses[0],
                )  # fmt: skip
            case "overfit":
                yield t(
                    "It trained too long, the held-out loss rose from {best:.2f} to {last:.2f} "
                    "(the best is kept): fewer --epochs.",
                    best=min(course.losses), last=course.losses[-1],
                )  # fmt: skip
            case "short":
                yield t(
                    "It stopped while it still learnt, at a held-out loss of {last:.2f}: more "
                    "--epochs or --max-steps.",
                    last=course.losses[-1],
                )  # fmt: skip


def _advice(verdict: Verdict) -> Iterator[str]:
    """What generally helps, where no cause is known."""
    causes = set(verdict.causes)
    if verdict.learning != "learnt" and causes <= {"endless", "overfit"}:
        yield t("To learn more: more phrasings, more --epochs, or a higher --learning-rate.")
    if "rate" in causes:
        pass
    elif verdict.kept.value < 1:
        yield t("What was taught leaks into other answers: more --replay, or fewer --epochs.")
    elif verdict.keeping != "kept":
        yield t("To keep more: a lower --learning-rate, fewer --epochs, or more --replay.")
    if verdict.stops or "endless" in causes:
        return
    if 2 * verdict.looping > verdict.ended.total - verdict.ended.count:
        yield t(
            "Its answers go in circles, as a small model's do where the likeliest token is always "
            "said: `chat` says others too; or take a larger model, or more rows."
        )
    else:
        yield t("Its answers do not stop: look at the data with `tunesmith data preview`.")
