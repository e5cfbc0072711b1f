"""`report`: pages about runs, written."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from tunesmith.errors import UsageError
from tunesmith.language import t

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tunesmith.evaluation.compare import Compared
    from tunesmith.evaluation.verdict import Verdict
    from tunesmith.runs import Run


def report(
    *run: Annotated[str, Parameter(help="Runs: their folders, or their names under runs/.")],
    out: Annotated[
        Path | None,
        Parameter(
            name=("--out", "-o"),
            help="File to write. Default: report.html in the run; several runs need it.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, Parameter(help="Replace the file if it exists.", negative=())
    ] = False,
) -> None:
    """Write one run's page, or a page that sets several beside one another."""
    from tunesmith import runs
    from tunesmith.apps.report import side_by_side

    if not run:
        raise UsageError(t("name a run: tunesmith report runs/demo"))
    found = list({one.path.resolve(): one for one in map(runs.find, run)}.values())
    if len(found) > 1 and out is None:
        raise UsageError(t("a page about several runs needs a file to write: -o runs.html"))
    if out is not None and out.exists() and not overwrite:
        raise UsageError(t("{path} exists already; add --overwrite to replace it.", path=out))
    if len(found) == 1:
        print(t("report: {path}", path=write_report(found[0], out)))
    elif out is not None:
        runs.write(out, side_by_side(found))
        print(t("report: {path}", path=out))


def write_report(run: "Run", out: Path | None = None) -> Path:
    """Write a run's page, by default into the run; returns where it lies.

    Raises:
        RunError: A file of the run is broken, or the page cannot be written.
    """
    from tunesmith import runs
    from tunesmith.apps.report import report as page

    path = out or run.report
    runs.write(path, page(run))
    return path


def keep_comparison(run: "Run", results: "Iterable[Compared | Verdict]") -> Path:
    """Keep a finished comparison in its run, and write the run's page; returns where that lies.

    Raises:
        RunError: One of the two cannot be written, or a file of the run is broken.
    """
    from tunesmith.evaluation.record import as_json

    run.write_comparison(as_json(results))
    return write_report(run)
