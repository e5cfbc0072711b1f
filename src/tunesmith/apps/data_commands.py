"""`tunesmith data …`: check, preview, identity, convert."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from tunesmith import runs
from tunesmith.config import require_range
from tunesmith.errors import DataError, UsageError
from tunesmith.language import t
from tunesmith.paths import write_atomic

if TYPE_CHECKING:
    from tunesmith.data.findings import Finding
    from tunesmith.data.messages import Conversation

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


def preview(
    file: Annotated[Path, Parameter(help="A training file.")],
    /,
    *,
    model: Annotated[str, Parameter(help="The model, or the run, whose tokens to show.")],
    rows: Annotated[int, Parameter(help="How many rows to show.")] = 3,
    max_length: Annotated[
        int | None, Parameter(help="Show what a limit of so many tokens would cut.")
    ] = None,
    html: Annotated[
        Path | None, Parameter(help="Write a page with the rows instead of printing them.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Show rows as the model's tokens, the trained ones marked."""
    from tunesmith.apps.terminal import console, sample_text
    from tunesmith.data.preview import lengths, preview_html, spans, summary
    from tunesmith.data.render import Renderer
    from tunesmith.models.store import locate
    from tunesmith.models.tokenizer import load_tokenizer

    require_range("--rows", rows, 1)
    if html is not None and html.exists() and not overwrite:
        raise UsageError(t("{path} exists already; add --overwrite to replace it.", path=html))
    base = runs.find(model).settings.model if runs.is_run(model) else model
    tokenizer = load_tokenizer(locate(base))
    renderer = Renderer(tokenizer)
    samples = [part for row in _good_rows(file, rows) for part in renderer.sample(row)]
    if html is not None:
        page = preview_html(samples, tokenizer, title=file.name, max_length=max_length)
        write_atomic(html, page)
        print(t("written: {path}", path=html))
        return
    screen = console()
    for sample in samples:
        screen.print(sample_text(spans(sample, tokenizer), max_length, screen), end="\n\n")
    for line in summary(lengths(samples, max_length)):
        screen.print(line)


def _good_rows(file: Path, count: int) -> list["Conversation"]:
    from tunesmith.data.checks import scan

    good = (
        row
        for row, findings in scan([file])
        if row is not None and not any(found.is_error for found in findings)
    )
    rows = list(islice(good, count))
    if not rows:
        raise DataError(t("{path} has no good row; see: tunesmith data check {path}", path=file))
    return rows


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
    require_range("--holdout", holdout, 0, 0.9)
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
    """A table on a terminal; elsewhere a line each, which grep and editors understand."""
    from tunesmith.apps.inert import inert
    from tunesmith.apps.terminal import console, table

    screen = console()
    if not screen.is_terminal:
        print("".join(inert(str(found)) + "\n" for found in findings), end="")
        return
    kinds = {"error": t("error"), "warning": t("note")}
    titles = (t("where"), t("field"), t("kind"), t("problem"), t("what to do"))
    rows = [
        (str(found.place), found.field or "", kinds[found.severity], found.problem, found.fix)
        for found in findings
    ]
    if rows:
        screen.print(table(titles, rows))
