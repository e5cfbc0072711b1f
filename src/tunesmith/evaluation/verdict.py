"""What a comparison amounts to: did it learn, did it keep what it knew, does it stop.

Three answers, each with its figures. The thresholds are these few constants.
"""

from dataclasses import dataclass
from typing import Literal

LEARNT = 0.9  # share of questions from which a run counts as having learnt
PARTLY = 0.3  # below, it has not
STOPS = 0.9  # share of answers that must end by themselves
STILL = 0.2  # nats a token by which a model may move from its base and have kept what it knew
FAR = 1.0  # beyond this it is damaged
SPREADS = 0.2  # as it is where what was taught is in more of the unrelated answers

Learning = Literal["learnt", "partly", "not"]
Keeping = Literal["kept", "drifted", "damaged"]


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
class Verdict:
    """What the answers amount to, and what training saw.

    Attributes:
        learnt: Questions answered right each time they were asked.
        kept: Unrelated answers free of what was taught.
        ended: Answers to identity and held-out questions that stopped by themselves.
        similarity: How alike the unrelated answers of base and tuned are, 0 to 1.
        kl: KL(base ‖ tuned) at neutral answers, nats a token (see `Drift`); None where training
            did not look.
        agreement: Share of those tokens at which both would say the same.
    """

    learnt: Share
    kept: Share
    ended: Share
    similarity: float
    kl: float | None = None
    agreement: float | None = None

    @property
    def learning(self) -> Learning:
        """Whether it learnt what it was taught."""
        if self.learnt.value >= LEARNT:
            return "learnt"
        return "partly" if self.learnt.value >= PARTLY else "not"

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
