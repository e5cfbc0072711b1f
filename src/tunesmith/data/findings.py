"""What is wrong with a training row: where, which field, and what to do about it."""

from dataclasses import dataclass
from typing import Literal

from tunesmith.data.messages import Place

Severity = Literal["error", "warning"]
Kind = Literal[
    "encoding",
    "byte-order-mark",
    "crlf",
    "unsupported-file",
    "empty-file",
    "broken-row",
    "duplicate-key",
    "not-a-number",
    "too-large",
    "unknown-form",
    "unused-field",
    "missing-field",
    "wrong-type",
    "unknown-role",
    "role-order",
    "no-answer",
    "empty",
    "placeholder",
    "control-token",
    "control-character",
    "duplicate",
    "contradiction",
    "leak",
]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one row. A row with an error is not trained on."""

    kind: Kind
    place: Place
    field: str | None
    problem: str
    fix: str
    severity: Severity = "error"

    @property
    def is_error(self) -> bool:
        """Whether the row must not be trained on as it is."""
        return self.severity == "error"

    def __str__(self) -> str:
        where = f"{self.place} {self.field}" if self.field else str(self.place)
        return f"{where}: {self.problem} {self.fix}"


class RowError(Exception):
    """Raised while one row is decoded; `at` makes it a finding once the place is known."""

    def __init__(self, kind: Kind, field: str | None, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.kind: Kind = kind
        self.field = field
        self.problem = problem
        self.fix = fix

    def at(self, place: Place) -> Finding:
        """The error as a finding."""
        return Finding(self.kind, place, self.field, self.problem, self.fix)
