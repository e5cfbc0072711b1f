"""What a comparison amounts to: did it learn, did it keep what it knew, does it stop; and why not.

Three answers, each with its figures, and the causes that data and training show. The thresholds
are these few constants.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

LEARNT = 0.9  # share of identity questions from which a run counts as having learnt
PARTLY = 0.3  # below, it has not
GAINED = 0.1  # nats a token by which the loss of held-out rows must fall to have learnt from others
STOPS = 0.9  # share of answers that must end by themselves
STILL = 0.2  # nats a token by which a model may move from its base and have kept what it knew
FAR = 1.0  # beyond this it is damaged
SPREADS = 0.2  # as it is where what was taught is in more of the unrelated answers
FITS = 0.05  # nats a token by which answers are likelier after their own questions
FEW = 10  # different questions; from fewer little is learnt, and none is held out
SOME = 0.1  # share of the rows from which a fault of the data counts
RISEN = 1.1  # times its lowest, the held-out loss at the end of a training that went on too long

Learning = Literal["learnt", "partly", "not"]
Keeping = Literal["kept", "drifted", "damaged"]
Cause = Literal["few", "contradicted", "shuffled", "endless", "rate", "overfit", "short"]


@dataclass(frozen=True)
class Share:
    """`count` of `total`."""

    count: int
    total: int

    @property
    def value(self) -> float:
        """The share, 1 where there is nothing to count."""
        return self.count / self.total if self.total else 1.0


@dataclass(frozen=True)
class Course:
    """What the data was, and how training went.

    Attributes:
        samples: Trained on.
        questions: Different ones that they ask.
        contradicted: Rows that ask what another one answers otherwise.
        endless: Samples in which the end of the answer is not trained.
        losses: Of the held-out rows, nats a token, from before the first step on; empty where
            none is held out.
        fit: Nats a token by which held-out answers are likelier after their own questions than
            after others'; None where that was not seen.
    """

    samples: int
    questions: int
    contradicted: int
    endless: int
    losses: tuple[float, ...] = ()
    fit: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What the answers amount to, and what training saw.

    Attributes:
        learnt: Identity questions answered with the name each time they were asked; or held-out
            ones answered more like their rows than the base does.
        kept: Unrelated answers free of what was taught.
        ended: Answers to identity and held-out questions that stopped by themselves.
        looping: How many of them say the same again and again instead.
        similarity: How alike the unrelated answers of base and tuned are, 0 to 1.
        kl: KL(base ‖ tuned) at neutral answers, nats a token (see `Drift`); None where training
            did not look.
        agreement: Share of those tokens at which both would say the same.
        loss: Of the held-out rows with the adapter that was kept, nats a token.
        likeness: Mean F1 of answers to held-out questions with what their rows say, of base and
            tuned (see `likeness.f1`); None where no held-out question was asked.
        course: Where the causes are looked for; None for a run that recorded too little.
    """

    learnt: Share
    kept: Share
    ended: Share
    similarity: float
    looping: int = 0
    kl: float | None = None
    agreement: float | None = None
    loss: float | None = None
    likeness: tuple[float, float] | None = None
    course: Course | None = None

    @property
    def learning(self) -> Learning:
        """Whether it learnt what it was taught; not wholly, where answers fit any question."""
        shuffled = self._amount == "learnt" and "shuffled" in self.causes
        return "partly" if shuffled else self._amount

    @property
    def gained(self) -> float | None:
        """By how many nats a token held-out rows are likelier than to the base."""
        if self.loss is None or self.course is None or not self.course.losses:
            return None
        return self.course.losses[0] - self.loss

    @property
    def _amount(self) -> Learning:
        """An identity shows in answers; what other rows teach, in the loss of those held out."""
        if self.likeness is not None and self.gained is not None:
            share, enough, some = self.gained, GAINED, 0.0
        else:
            share, enough, some = self.learnt.value, LEARNT, PARTLY
        if share >= enough:
            return "learnt"
        return "partly" if share > some else "not"

    @property
    def keeping(self) -> Keeping:
        """Whether it kept what it knew, by what leaked and by how far it moved."""
        leaked, kl = 1 - self.kept.value, self.kl or 0.0
        if leaked > SPREADS or kl > FAR:
            return "damaged"
        return "kept" if leaked == 0 and kl <= STILL else "drifted"

    @property
    def stops(self) -> bool:
        """Whether its answers end by themselves."""
        return self.ended.value >= STOPS

    @property
    def passed(self) -> bool:
        """Learnt, kept, and it stops."""
        return self.learning == "learnt" and self.keeping == "kept" and self.stops

    @property
    def causes(self) -> tuple[Cause, ...]:
        """What is wrong with the data or the training, the data first.

        - few: the rows ask fewer than `FEW` different questions;
        - contradicted: some rows ask what others answer otherwise;
        - shuffled: held-out answers are no likelier after their own questions than after others';
        - endless: of some answers the end is not trained;
        - rate: the held-out loss ended above that of the base;
        - overfit: the held-out loss has risen again; what is kept is from before;
        - short: little was learnt, nothing else is wrong, and the held-out loss still fell.
        """
        return tuple(self._causes(self.course)) if self.course is not None else ()

    def _causes(self, course: Course) -> Iterator[Cause]:
        first, *later = course.losses or (0.0,)
        fell = bool(later) and min(later) < first
        ruined = bool(later) and later[-1] > first
        little = self._amount != "learnt"
        short = little and fell and later[-1] <= min(later) and not ruined
        if course.questions < FEW:
            yield "few"
        if course.contradicted > SOME * course.samples:
            yield "contradicted"
        elif fell and not ruined and not short and course.fit is not None and course.fit < FITS:
            yield "shuffled"
        elif short and course.questions >= FEW:
            yield "short"
        if course.endless > SOME * course.samples:
            yield "endless"
        if ruined:
            yield "rate"
        elif fell and later[-1] > RISEN * min(later):
            yield "overfit"
