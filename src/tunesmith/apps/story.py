"""What the files of a run tell, for the page and the report."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tunesmith.config import settings_to
from tunesmith.errors import RunError
from tunesmith.language import t
from tunesmith.runs import Run


@dataclass(frozen=True)
class Story:
    """What the files of a run tell; what is broken is told by `problems`."""

    run: Run
    begun: datetime
    settings: dict[str, Any] | None
    events: list[dict[str, Any]]
    problems: tuple[str, ...]

    def last(self, kind: str) -> dict[str, Any]:
        """The last event of a kind, empty if there is none."""
        return next((event for event in reversed(self.events) if event["event"] == kind), {})

    @property
    def state(self) -> str:
        """How far it has come, in a word."""
        if self.run.trainer is not None:
            return t("running")
        if self.run.adapter.is_dir():
            return t("finished")
        if self.problems:
            return t("broken")
        return t("failed") if self.events and self.events[-1]["event"] == "Failed" else t("stopped")


def story_of(run: Run) -> Story:
    """Read what a run has recorded; what cannot be read is told, not raised."""
    settings: dict[str, Any] | None = None
    events: list[dict[str, Any]] = []
    problems: list[str] = []
    try:
        settings = settings_to(run.settings)
    except RunError as error:
        problems.append(str(error))
    try:
        events = run.events()
    except RunError as error:
        problems.append(str(error))
    return Story(run, run.begun, settings, events, tuple(problems))


def differences(settings: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """The settings in which runs differ, a row each; `settings` maps a run's name to its own."""
    names = sorted({name for own in settings.values() for name in own} - {"out"})
    rows = []
    for name in names:
        values = {run: shown(own.get(name)) for run, own in settings.items()}
        if len(set(values.values())) > 1:
            rows.append({t("setting"): name.replace("_", " ")} | values)
    return rows


def shown(value: Any) -> str:
    """A setting's value as people read it."""
    if value is None:
        return t("automatic")
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
