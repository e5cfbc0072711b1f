"""Base beside tuned: the same questions, greedy, and what they say about learning and keeping.

Identity questions are phrasings that no identity set trains on; neutral questions are everyday
ones that are not about the assistant. Each is asked with and without the run's system prompt.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import groupby
from pathlib import Path
from typing import Literal

from tunesmith.chat import Pipeline, Stats, answers, open_pipeline, with_system
from tunesmith.data import identity, neutral
from tunesmith.data.messages import Conversation, Identity, Message
from tunesmith.data.sources import read
from tunesmith.engines.base import GREEDY
from tunesmith.engines.choose import EngineName
from tunesmith.errors import DataError, RunError
from tunesmith.evaluation.likeness import f1, repetition
from tunesmith.evaluation.verdict import Course, Share, Verdict
from tunesmith.language import t
from tunesmith.models.adapter import check_adapter, read_info
from tunesmith.models.store import locate
from tunesmith.runs import Run

Kind = Literal["identity", "neutral", "held_out", "asked"]
QUESTIONS = 10  # of each kind
MAX_TOKENS = 40
LOOPS = 0.5  # of its runs of four words an answer has said before, if it goes in circles
LONGEST = 512  # tokens, where a held-out row tells how long a good answer is


@dataclass(frozen=True)
class Question:
    """What is asked; `reference` is the answer a held-out row gives."""

    kind: Kind
    text: str
    messages: tuple[Message, ...]
    reference: str | None = None

    @property
    def has_system(self) -> bool:
        """Whether it is asked behind a system prompt."""
        return self.messages[0].role == "system"

    @property
    def max_tokens(self) -> int:
        """How long an answer may become."""
        return MAX_TOKENS if self.reference is None else LONGEST

    @property
    def ends(self) -> bool:
        """Whether a good answer ends within that: a token is hardly less than a byte."""
        return self.reference is None or len(self.reference.encode()) < LONGEST


@dataclass(frozen=True)
class Answer:
    """A greedy answer; `ended` says whether the model stopped by itself within the limit."""

    text: str
    ended: bool

    @property
    def loops(self) -> bool:
        """Whether it says the same again and again, and does not find an end."""
        return not self.ended and repetition(self.text) >= LOOPS


@dataclass(frozen=True)
class Compared:
    """One question answered by base and tuned.

    `learnt` is for identity (the name is said) and held-out questions (closer to the reference
    than the base is); `kept` is for neutral ones (the name and the author are not said, unless
    the base says them too).
    """

    question: Question
    base: Answer
    tuned: Answer
    learnt: bool | None
    kept: bool | None

    @property
    def similarity(self) -> float:
        """How alike the two answers are, 0 to 1."""
        return SequenceMatcher(None, self.base.text, self.tuned.text, autojunk=False).ratio()


def compare(
    run: Run,
    *,
    ask: Path | None = None,
    questions: int = QUESTIONS,
    engine: EngineName = "auto",
    device: str = "auto",
) -> Iterator[Compared | Verdict]:
    """Ask base and tuned the same; yields every pair of answers, then the verdict.

    With `ask`, the questions are those of a file: text, one a line, or any training format.

    Raises:
        RunError: The run has no adapter yet.
        DataError: The file holds no question.
        TunesmithError: The model or the adapter does not load.
    """
    asked = from_file(ask, run) if ask else held_out(run, questions)
    model = locate(run.settings.model)
    check_adapter(run.adapter, model)
    pipeline = open_pipeline(model, run.adapter, engine=engine, device=device, all_cores=True)
    try:
        yield from ask_both(run, pipeline, asked)
    finally:
        pipeline.close()


def ask_both(
    run: Run, pipeline: Pipeline, asked: Sequence[Question]
) -> Generator[Compared | Verdict, None, None]:
    """`compare` with the run's model already open, and questions already chosen."""
    pairs = []
    for pair in _pairs(pipeline, asked, _identity(run)):
        pairs.append(pair)
        yield pair
    yield verdict(pairs, run)


def held_out(run: Run, count: int = QUESTIONS) -> list[Question]:
    """Identity questions if the run has an identity, else its held-out rows; and neutral ones.

    Raises:
        RunError: The run has no adapter yet.
    """
    who, system = run.data.get("identity"), trained_system(run)
    found: list[Question] = []
    if who is not None:
        texts = _alternating([identity.held_out([language]) for language in who["languages"]])
        found += _both_ways("identity", texts[:count], system)
    elif run.held_out.exists():
        rows = [row for row in read([run.held_out]) if isinstance(row, Conversation)]
        found += [_from_row("held_out", row, None) for row in rows[:count]]
    return [*found, *_both_ways("neutral", neutral.held_out(count), system)]


def from_texts(texts: Iterable[str], run: Run) -> list[Question]:
    """Questions of one's own, behind the system prompt the run was trained with.

    Raises:
        RunError: The run has no adapter yet.
        DataError: There is none.
    """
    system = trained_system(run)
    found = [_question("asked", text.strip(), system) for text in texts if text.strip()]
    if not found:
        raise DataError(t("There is no question; write one a line."))
    return found


def from_file(file: Path, run: Run) -> list[Question]:
    """Those of a file: text, one a line, or any training format.

    Raises:
        RunError: The run has no adapter yet.
        DataError: The file holds no question.
    """
    system = trained_system(run)
    if file.suffix == ".txt":
        texts = file.read_text("utf-8-sig").splitlines()
        found = [_question("asked", text.strip(), system) for text in texts if text.strip()]
    else:
        rows = [row for row in read([file]) if isinstance(row, Conversation)]
        found = [_from_row("asked", row, system) for row in rows]
    if not found:
        raise DataError(
            t("{file} holds no question; write one a line in a .txt file, or give training rows.",
              file=file)
        )  # fmt: skip
    return found


def verdict(pairs: Sequence[Compared], run: Run) -> Verdict:
    """Count what the pairs show, beside what training saw of the adapter that was kept."""
    right: dict[str, bool] = {}
    for pair in pairs:
        if pair.learnt is not None:
            text = pair.question.text
            right[text] = right.get(text, True) and pair.learnt
    kept = [pair for pair in pairs if pair.kept is not None]
    own = [pair for pair in pairs if pair.learnt is not None and pair.question.ends]
    alike = [pair.similarity for pair in kept]
    return Verdict(
        learnt=Share(sum(right.values()), len(right)),
        kept=Share(sum(bool(pair.kept) for pair in kept), len(kept)),
        ended=Share(sum(pair.tuned.ended for pair in own), len(own)),
        looping=sum(pair.tuned.loops for pair in own),
        similarity=sum(alike) / len(alike) if alike else 1.0,
        likeness=_mean_likeness(pairs),
        **_kept_checkpoint(run),
        course=_course(run),
    )


def _pairs(
    pipeline: Pipeline, asked: Sequence[Question], who: Identity | None
) -> Iterator[Compared]:
    # All of the base first: llama.cpp does not decode requests with different adapters together.
    base = list(_answers(pipeline, asked, adapter=False))
    tuned = _answers(pipeline, asked, adapter=True)
    for question, (before, old), (after, new) in zip(asked, base, tuned, strict=True):
        yield Compared(
            question,
            Answer(before, old.finish == "stop"),
            Answer(after, new.finish == "stop"),
            learnt=_learnt(question, before, after, who),
            kept=_kept(before, after, who) if question.kind == "neutral" else None,
        )


def _answers(
    pipeline: Pipeline, asked: Sequence[Question], *, adapter: bool
) -> Iterator[tuple[str, Stats]]:
    for tokens, some in groupby(asked, key=lambda question: question.max_tokens):
        sampling = replace(GREEDY, max_tokens=tokens)
        conversations = [question.messages for question in some]
        yield from answers(pipeline, conversations, sampling, adapter=adapter)


def _learnt(question: Question, before: str, after: str, who: Identity | None) -> bool | None:
    if question.kind == "identity" and who is not None:
        return who.name in after
    if question.reference is not None:
        return f1(after, question.reference) > f1(before, question.reference)
    return None


def _kept(before: str, after: str, who: Identity | None) -> bool:
    names = (who.name, who.author) if who is not None else ()
    return not any(name in after and name not in before for name in names)


def _from_row(kind: Kind, row: Conversation, system: str | None) -> Question:
    """The row up to its last answer, which is the reference."""
    last = max(index for index, turn in enumerate(row.messages) if turn.role == "assistant")
    asked = row.messages[:last]
    prompt = asked if row.system is not None else tuple(with_system(system, asked))
    return Question(kind, asked[-1].content, prompt, row.messages[last].content)


def _both_ways(kind: Kind, texts: Sequence[str], system: str | None) -> list[Question]:
    systems = [None] if system is None else [system, None]
    return [_question(kind, text, chosen) for text in texts for chosen in systems]


def _question(kind: Kind, text: str, system: str | None) -> Question:
    return Question(kind, text, tuple(with_system(system, [Message("user", text)])))


def _alternating(lists: Sequence[Sequence[str]]) -> list[str]:
    return [text for turn in zip(*lists, strict=False) for text in turn]


def _mean_likeness(pairs: Sequence[Compared]) -> tuple[float, float] | None:
    """Of base and tuned to what held-out rows answer."""
    found = [
        (f1(pair.base.text, wanted), f1(pair.tuned.text, wanted))
        for pair in pairs
        if (wanted := pair.question.reference) is not None
    ]
    if not found:
        return None
    base, tuned = (sum(some) / len(found) for some in zip(*found, strict=True))
    return base, tuned


def _kept_checkpoint(run: Run) -> dict[str, float]:
    """What training saw of the checkpoint it kept: its held-out loss, and how far it moved."""
    best = [event for event in run.events() if event["event"] == "Evaluated" and event["best"]]
    seen = best[-1] if best else {}
    return {name: seen[name] for name in ("loss", "kl", "agreement") if seen.get(name) is not None}


def _course(run: Run) -> Course | None:
    """What the run recorded of its data and its training; runs of old recorded less."""
    data, events = run.data, run.events()
    if "endless" not in data:
        return None
    looks = tuple(event["loss"] for event in events if event["event"] == "Evaluated")
    fits = [event.get("fit") for event in events if event["event"] == "Finished"]
    return Course(
        samples=data["samples"],
        questions=data["questions"],
        contradicted=data["contradicted"],
        endless=data["endless"],
        losses=looks,
        fit=fits[-1] if fits else None,
    )


def _identity(run: Run) -> Identity | None:
    who = run.data.get("identity")
    return Identity(who["name"], who["author"]) if who is not None else None


def trained_system(run: Run) -> str | None:
    """The system prompt the run was trained with.

    Raises:
        RunError: The run has no adapter yet.
    """
    if not run.adapter.is_dir():
        raise RunError(
            t("{path} has not finished training; go on with `tunesmith train --resume {path}`.",
              path=run.path)
        )  # fmt: skip
    info = read_info(run.adapter)
    return info.system if info is not None else None
