"""A few of the rows that a run was trained on, token by token, while its data is still here."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from tunesmith.data.checks import question_key, questions
from tunesmith.data.forms import Parsed
from tunesmith.data.json_rows import Row
from tunesmith.data.sources import parsed, raw_rows
from tunesmith.errors import TunesmithError
from tunesmith.runs import Run

SAMPLES = 3
LOOKED_AT = 200  # rows
LONGEST = 400  # tokens, so that the page stays one to read


def trained_samples(run: Run, data: Mapping[str, Any]) -> list[str]:
    """HTML of some short samples; none if a file has changed, or the model is gone."""
    try:
        return list(_samples(run)) if _unchanged(run, data) else []
    except (TunesmithError, OSError):
        return []


def _unchanged(run: Run, data: Mapping[str, Any]) -> bool:
    from tunesmith.training.samples import file_hashes

    files = run.settings.data
    if not files or not all(file.is_file() for file in files):
        return False
    known = data["files"]
    return [known.get(str(file)) for file in files] == file_hashes(files)


def _samples(run: Run) -> Iterator[str]:
    from tunesmith.data.preview import sample_html
    from tunesmith.models.store import locate
    from tunesmith.models.tokenizer import load_tokenizer
    from tunesmith.training.rendering import Job, Rendering
    from tunesmith.training.samples import Table

    settings = run.settings
    tokenizer = load_tokenizer(locate(settings.model))
    rendering = Rendering(Job(tokenizer, settings.max_length, settings.system, {}))
    columns = rendering.render(list(_rows(run))).columns
    if columns is None:
        return
    table = Table.of([columns])
    every = map(table.sample, range(len(columns.samples)))
    short = [sample for sample in every if len(sample.input_ids) <= LONGEST]
    step = max(1, len(short) // SAMPLES)
    for number, sample in enumerate(short[::step][:SAMPLES], 1):
        yield sample_html(number, sample, tokenizer)


def _rows(run: Run) -> Iterator[Row]:
    """Rows of the training files that were not held out, each question once."""
    met = set(questions([run.held_out])) if run.held_out.exists() else set()
    for item in islice(raw_rows(run.settings.data), LOOKED_AT):
        found = parsed(item)
        if isinstance(item, Row) and isinstance(found, Parsed):
            key = question_key(found.conversation)
            if key not in met:
                met.add(key)
                yield item
