"""`tunesmith data …`: check, preview, identity, convert."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from tunesmith.errors import UsageError
from tunesmith.language import t

if TYPE_CHECKING:
    from tunesmith.data.findings import Finding

Out = Annotated[Path, Parameter(name=("--out", "-o"), help="File to write.")]
Overwrite = Annotated[bool, Parameter(help="Replace the file if it exists.", negative=())]


def check(
    *files: Annotated[Path, Parameter(help="Training files: JSON, JSONL, CSV or Parquet.")],
    held_out: Annotated[
        tuple[Path, ...], Parameter(help="Files whose questions must not be trained on.")
    ] = (),
    json: Annotated[bool, Parameter(help="Print the findings as JSON.", negative=())] = False,
) -> int:
    """Print every finding; 1 if there is a row that cannot be trained on."""
    from tunesmith.data.checks import check as examine

    _require(files, "check")
    report = examine(files, held_out)
    if json:
        from tunesmith.apps.terminal import print_json

        print_json(asdict(report))
    else:
        _show_findings(report.findings)
        print(
            t("{usable} of {rows} rows can be trained on.", usable=report.usable, rows=report.rows)
        )
    return 1 if report.errors else 0


def identity(
    *,
    name: Annotated[str, Parameter(help="What the assistant is called.")],
    author: Annotated[str, Parameter(help="Who made it.")],
    out: Out,
    language: Annotated[str, Parameter(help="Languages of the questions.")] = "zh,en",
    system: Annotated[
        str | None, Parameter(help="System prompt of half the rows. Default: one with the name.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the who-are-you set."""
    from tunesmith.data.identity import write_identity

    languages = [word.strip() for word in language.split(",")]
    rows = write_identity(
        out, name, author, languages=languages, system=system, overwrite=overwrite
    )
    print(t("{rows} rows written to {path}", rows=rows, path=out))
    print(t("Next: tunesmith train --data {path}", path=shlex.quote(str(out))))


def convert(
    *files: Annotated[Path, Parameter(help="Training files: JSON, JSONL, CSV or Parquet.")],
    out: Out,
    holdout: Annotated[
        float, Parameter(help="Share of the rows to put into a second file, for evaluation.")
    ] = 0.0,
    seed: Annotated[int, Parameter(help="Seed of the split.")] = 42,
    overwrite: Overwrite = False,
) -> None:
    """Write the good rows as messages; say what was left out."""
    from tunesmith.data.convert import convert as write

    _require(files, "convert")
    if not 0 <= holdout < 1:
        raise UsageError(t("--holdout {share} is out of range; allowed: 0 … 1.", share=holdout))
    done = write(files, out, holdout=holdout, seed=seed, overwrite=overwrite)
    _show_findings(done.left_out)
    print(t("{rows} rows written to {path}", rows=done.rows, path=done.path))
    if done.held_out_path is not None:
        print(t("{rows} rows written to {path}", rows=done.held_out, path=done.held_out_path))


def _require(files: Sequence[Path], command: str) -> None:
    if not files:
        raise UsageError(
            t("no file is named; type: tunesmith data {command} FILE…", command=command)
        )


def _show_findings(findings: Sequence["Finding"]) -> None:
    from tunesmith.apps.terminal import console, table

    if not findings:
        return
    kinds = {"error": t("error"), "warning": t("note")}
    titles = (t("where"), t("field"), t("kind"), t("problem"), t("what to do"))
    rows = [
        (str(found.place), found.field or "", kinds[found.severity], found.problem, found.fix)
        for found in findings
    ]
    console().print(table(titles, rows))
