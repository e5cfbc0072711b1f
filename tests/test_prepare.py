"""Preparing data: many rows give what few rows give, from a table that is made once."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import psutil
import pytest

from tests.helpers_data import load, parquet
from tests.tiny_models import tiny_tokenizer_folder
from tunesmith.config import TrainSettings
from tunesmith.data.checks import question_key
from tunesmith.data.convert import as_row, split
from tunesmith.data.messages import Conversation, Message
from tunesmith.data.packs import Sample
from tunesmith.data.render import Renderer
from tunesmith.data.sources import raw_rows
from tunesmith.errors import DataError, ModelError, TrainingError, UsageError
from tunesmith.language import LANGUAGES, language_of
from tunesmith.models.tokenizer import ChatTokenizer, read_tokenizer
from tunesmith.training import prepare as preparing
from tunesmith.training.prepare import Prepared, prepare
from tunesmith.training.rendering import Job, Rendering
from tunesmith.training.samples import TRAINED, Table

EXAMPLES = Path(__file__).parents[1] / "examples" / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ChatTokenizer:
    return read_tokenizer(folder)


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch, home: Path) -> Path:
    """Seven rows count as a chunk, and one chunk as many; returns the folder of tables."""
    monkeypatch.setattr(preparing, "CHUNK", 7)
    monkeypatch.setattr(preparing, "FEW", 1)
    return home / "cache" / "samples"


def rows(count: int, words: int = 4) -> list[dict[str, Any]]:
    """Every third row has a system prompt, every fifth asks what the one before asked."""
    return [
        {
            "instruction": f"What is the capital of number {number - (number % 5 == 4)}?",
            "input": "",
            "output": " ".join(f"It is {number}." for _ in range(words)),
            "system": f"You are helpful in {number % 2} ways." if number % 3 == 0 else "",
        }
        for number in range(count)
    ]


def write(file: Path, some: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in some), "utf-8")
    return file


@dataclass(frozen=True)
class Plain:
    """What the plain way gives: everything in memory, one row after another."""

    train: list[Sample]
    held_out: list[Sample]
    held_out_rows: list[Conversation]
    systems: tuple[str | None, ...]
    systems_in: dict[str, tuple[str | None, ...]]
    cut: int
    dropped: int


def plainly(settings: TrainSettings, tokenizer: ChatTokenizer) -> Plain:
    kept = [_with_system(row, settings.system) for row in load(settings.data, settings.eval_data)]
    held_out: list[Conversation] = []
    if settings.eval_data:
        held_out = [_with_system(row, settings.system) for row in load(settings.eval_data)]
    elif len({question_key(row) for row in kept}) >= preparing.MIN_QUESTIONS_TO_SPLIT:
        kept, held_out = split(kept, settings.holdout, seed=settings.seed)
    renderer, most = Renderer(tokenizer), settings.max_length
    whole = [sample for row in kept for sample in renderer.sample(row)]
    train = [Sample(one.input_ids[:most], one.trained[:most]) for one in whole]
    lost = [a.trained_tokens < b.trained_tokens for a, b in zip(train, whole, strict=True)]
    other = [sample for row in held_out for sample in renderer.sample(row)]
    shortened = [Sample(one.input_ids[:most], one.trained[:most]) for one in other]
    return Plain(
        train=[sample for sample in train if sample.trained_tokens],
        held_out=[sample for sample in shortened if sample.trained_tokens],
        held_out_rows=held_out,
        systems=systems(kept),
        systems_in={
            language: systems([row for row in kept if language_of(asked(row)) == language])
            for language in LANGUAGES
        },
        cut=sum(was and bool(one.trained_tokens) for was, one in zip(lost, train, strict=True)),
        dropped=sum(not sample.trained_tokens for sample in train),
    )


def systems(rows: Sequence[Conversation]) -> tuple[str | None, ...]:
    return tuple(system for system, _ in Counter(row.system for row in rows).most_common())


def asked(row: Conversation) -> str:
    return next(message.content for message in row.messages if message.role == "user")


def _with_system(row: Conversation, system: str | None) -> Conversation:
    if system is None or row.system is not None:
        return row
    return replace(row, messages=(Message("system", system), *row.messages))


def require_same(found: Prepared, expected: Plain) -> None:
    assert list(found.train) == expected.train
    assert list(found.held_out) == expected.held_out
    assert list(map(as_row, found.held_out_rows)) == list(map(as_row, expected.held_out_rows))
    assert found.systems == expected.systems
    assert found.systems_in == expected.systems_in
    assert (found.cut, found.dropped) == (expected.cut, expected.dropped)
    assert found.train.tokens == sum(len(sample.input_ids) for sample in expected.train)
    assert found.train.trained_tokens == sum(sample.trained_tokens for sample in expected.train)


def csv_of(some: Sequence[dict[str, Any]]) -> str:
    lines = [",".join(json.dumps(str(value)) for value in row.values()) for row in some]
    return "\n".join([",".join(some[0]), *lines])


def every_format(path: Path) -> tuple[Path, ...]:
    some = rows(60)
    files = [path / name for name in ("a.jsonl", "b.json", "c.json", "d.csv")]
    write(files[0], some[:20])
    files[1].write_text(json.dumps(some[20:30]), "utf-8")
    files[2].write_text(json.dumps(some[30:40], indent=1), "utf-8")
    files[3].write_text(csv_of(some[40:50]), "utf-8")
    return (*files, parquet(path / "e.parquet", some[50:]))


def test_few_rows_and_many_give_what_the_plain_way_gives(
    tmp_path: Path, tokenizer: ChatTokenizer, many: Path
) -> None:
    settings = TrainSettings(data=every_format(tmp_path), holdout=0.2, system="Be brief.")
    for changed in ({}, {"max_length": 70}, {"seed": 7, "holdout": 0.5}, {"holdout": 0.0}):
        chosen = replace(settings, **changed)
        in_table = prepare(chosen, tokenizer)
        require_same(in_table, plainly(chosen, tokenizer))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(preparing, "FEW", 1000)
            in_memory = prepare(chosen, tokenizer)
        require_same(in_memory, plainly(chosen, tokenizer))
        assert in_memory.summary() == in_table.summary()
    assert len(list(many.glob("[!.]*"))) == 2  # one for each length; a split makes no other
    assert in_table.cut == 0 and prepare(replace(settings, max_length=70), tokenizer).cut > 0


def test_the_shipped_examples_are_the_same_in_a_table(tokenizer: ChatTokenizer, many: Path) -> None:
    files = tuple(sorted(file for file in EXAMPLES.iterdir() if file.suffix != ".md"))
    assert files
    for file in files:
        settings = TrainSettings(data=(file,))
        require_same(prepare(settings, tokenizer), plainly(settings, tokenizer))


def test_identity_rows_and_evaluation_files(
    tmp_path: Path, tokenizer: ChatTokenizer, many: Path
) -> None:
    who = {"name": "Ada", "author": "Bo"}
    chinese = {"instruction": "你是谁？", "output": "我是 Ada。", "identity": who}
    train = write(tmp_path / "a.jsonl", [*rows(20), chinese])
    held_out = write(tmp_path / "b.jsonl", [{"instruction": "new", "output": "yes"}] * 9)
    settings = TrainSettings(data=(train,), eval_data=(held_out,))
    found = prepare(settings, tokenizer)
    require_same(found, plainly(settings, tokenizer))
    assert found.summary()["identity"] == who | {"languages": ["zh"]}
    assert len(found.held_out) == 9
    leak = replace(settings, eval_data=(train,))
    with pytest.raises(DataError, match=r"cannot be trained on: 21\. .*a\.jsonl:1"):
        prepare(leak, tokenizer)


def test_no_more_rows_are_held_out_than_are_of_use(
    tmp_path: Path, tokenizer: ChatTokenizer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "MOST_HELD_OUT", 5)
    found = prepare(TrainSettings(data=(write(tmp_path / "a.jsonl", rows(60)),)), tokenizer)
    assert len(found.held_out) == 3
    half = TrainSettings(data=(tmp_path / "a.jsonl",), holdout=0.5)
    assert len(prepare(half, tokenizer).held_out) in (5, 6)


def test_broken_rows_are_refused_as_in_the_plain_way(
    tmp_path: Path, tokenizer: ChatTokenizer, many: Path
) -> None:
    lines = [json.dumps(row) for row in rows(50)]
    lines[23] = '{"instruction": "q", }'
    lines[31] = json.dumps({"instruction": "q", "output": " "})
    file, empty = tmp_path / "a.jsonl", write(tmp_path / "empty.jsonl", [])
    file.write_text("\n".join(lines), "utf-8")
    settings = TrainSettings(data=(file, empty))
    with pytest.raises(DataError) as expected:
        load(settings.data)
    with pytest.raises(DataError) as found:
        prepare(settings, tokenizer)
    assert str(found.value) == str(expected.value)
    assert "cannot be trained on: 3." in str(found.value) and f"{file}:24" in str(found.value)
    assert not list(many.glob("[!.]*")) and not list(many.glob(".*.part"))
    with pytest.raises(UsageError, match="does not exist"):
        prepare(replace(settings, eval_data=(tmp_path / "none",)), tokenizer)


def test_a_row_that_the_template_refuses_is_named(tmp_path: Path, many: Path) -> None:
    template = (
        "{% for m in messages %}{% if 'number 31' in m.content %}{{ raise_exception('not 31') }}"
        "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = read_tokenizer(tiny_tokenizer_folder(tmp_path / "t", template=template))
    file = write(tmp_path / "a.jsonl", rows(50))
    with pytest.raises(DataError, match=r"a\.jsonl:32: .*not 31"):
        prepare(TrainSettings(data=(file,)), tokenizer)


def test_nothing_left_is_refused_from_a_table_too(
    tmp_path: Path, tokenizer: ChatTokenizer, many: Path
) -> None:
    file = write(tmp_path / "a.jsonl", rows(20))
    with pytest.raises(TrainingError, match="all 18 samples lose"):
        prepare(TrainSettings(data=(file,), max_length=8), tokenizer)


def test_a_table_is_found_again_until_something_changes(
    tmp_path: Path, tokenizer: ChatTokenizer, many: Path, folder: Path
) -> None:
    file = write(tmp_path / "a.jsonl", rows(30))
    settings = TrainSettings(data=(file,))
    first = prepare(settings, tokenizer)
    [table] = many.glob("[!.]*")
    made = (table / "tokens").stat().st_mtime_ns
    moved = replace(settings, data=(file.rename(tmp_path / "b.jsonl"),), seed=5, holdout=0.3)
    prepare(moved, tokenizer)
    again = prepare(replace(moved, seed=settings.seed, holdout=settings.holdout), tokenizer)
    assert again.fingerprint == first.fingerprint
    assert [*many.glob("[!.]*")] == [table]
    assert (table / "tokens").stat().st_mtime_ns == made

    some = rows(30)
    some[17]["output"] = some[17]["output"].replace("It", "at")  # as many bytes
    write(tmp_path / "b.jsonl", some)
    changed = prepare(replace(settings, data=moved.data), tokenizer)
    assert changed.fingerprint != first.fingerprint
    others = [
        (replace(moved, max_length=60), tokenizer),
        (replace(moved, system="Be kind."), tokenizer),
        (moved, read_tokenizer(_with_other_template(folder, tmp_path / "t"))),
    ]
    for number, (other, used) in enumerate(others, start=3):
        prepare(other, used)
        assert len(list(many.glob("[!.]*"))) == number
    for length in range(61, 70):
        prepare(replace(moved, max_length=length), tokenizer)
    assert len(list(many.glob("[!.]*"))) == preparing.TABLES_KEPT


def _with_other_template(folder: Path, path: Path) -> Path:
    template = (folder / "chat_template.jinja").read_text("utf-8")
    return tiny_tokenizer_folder(
        path, template=template.replace("['role'] + ", "['role'] + ' ' + ")
    )


@pytest.mark.parametrize("column", ["tokens", "samples", "rows", "text", "manifest.json"])
def test_a_damaged_table_is_made_anew(
    tmp_path: Path, tokenizer: ChatTokenizer, many: Path, column: str
) -> None:
    settings = TrainSettings(data=(write(tmp_path / "a.jsonl", rows(30)),))
    first = prepare(settings, tokenizer)
    expected = list(first.train), list(map(as_row, first.held_out_rows))
    [table] = many.glob("[!.]*")
    content = (table / column).read_bytes()
    other = table.with_name("other")
    shutil.copytree(table, other)
    assert Table.opened(other) is not None
    for place in range(0, len(content), max(1, len(content) // 100)):
        flipped = bytearray(content)
        flipped[place] ^= 1
        (other / column).write_bytes(flipped)
        assert Table.opened(other) is None
    for damage in (
        lambda: (table / column).write_bytes(b"\0" + content[1:]),
        lambda: (table / column).write_bytes(content[:-3]),
        (table / column).unlink,
    ):
        damage()
        found = prepare(settings, tokenizer)
        assert (list(found.train), list(map(as_row, found.held_out_rows))) == expected


def test_a_token_or_a_mask_alone_changes_the_fingerprint(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    rendering = Rendering(Job(tokenizer, 100, None, {}))
    columns = rendering.render(list(raw_rows([write(tmp_path / "a.jsonl", rows(5))]))).columns
    assert columns is not None
    prints = set()
    for bit in (0, 1, TRAINED):
        tokens = columns.tokens.copy()
        tokens[40] ^= bit
        table = Table.of([replace(columns, tokens=tokens)])
        prints |= {table.samples_of(np.ones(5, np.bool_)).sha256}
    some = np.array([True, True, True, True, False])
    prints |= {Table.of([columns]).samples_of(some).sha256}
    assert len(prints) == 4


# without `if __name__ == "__main__"`, as a beginner writes it
CHILD = """
import json, sys, threading, psutil
from pathlib import Path
from tunesmith.config import TrainSettings
from tunesmith.models.tokenizer import read_tokenizer
from tunesmith.training.prepare import prepare

tokenizer, process = read_tokenizer(Path(sys.argv[1])), psutil.Process()
before, seen, done = process.memory_info().rss, [0], threading.Event()
def look():
    while not done.wait(0.01):
        seen.append(process.memory_info().rss - before)
looking = threading.Thread(target=look)
looking.start()
found = prepare(TrainSettings(data=(Path(sys.argv[2]),)), tokenizer)
done.set()
looking.join()
print(json.dumps([found.fingerprint, max(seen)]))
"""


def begin(folder: Path, file: Path, home: Path) -> subprocess.Popen[str]:
    script = file.with_name("child.py")
    script.write_text(CHILD, "utf-8")
    environment = {**os.environ, "TUNESMITH_HOME": str(home)}
    command = [sys.executable, str(script), str(folder), str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def outcome(child: subprocess.Popen[str]) -> tuple[str, int]:
    said, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    fingerprint, memory = json.loads(said)
    return fingerprint, memory


def test_killed_on_the_way_it_leaves_no_process_and_nothing_that_looks_whole(
    tmp_path: Path, folder: Path, tokenizer: ChatTokenizer, home: Path
) -> None:
    file = write(tmp_path / "a.jsonl", rows(8000))
    child = begin(folder, file, home)
    tables = home / "cache" / "samples"
    deadline = time.monotonic() + 60
    while not any(part.stat().st_size for part in tables.glob(".*.part/tokens")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    helpers = psutil.Process(child.pid).children()
    child.kill()
    child.communicate()
    assert helpers
    _, alive = psutil.wait_procs(helpers, timeout=20)
    assert not alive
    assert list(tables.glob(".*.part")) and not list(tables.glob("[!.]*"))
    again = prepare(TrainSettings(data=(file,)), tokenizer)
    assert not list(tables.glob(".*.part")) and len(list(tables.glob("[!.]*"))) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "FEW", 1000)
        assert prepare(TrainSettings(data=(file,)), tokenizer).fingerprint == again.fingerprint


def test_a_helper_that_is_killed_is_a_sentence(
    tmp_path: Path, tokenizer: ChatTokenizer, home: Path
) -> None:
    file = write(tmp_path / "a.jsonl", rows(8000))
    before = psutil.Process().children()

    def kill() -> None:
        while not (helpers := [one for one in psutil.Process().children() if one not in before]):
            time.sleep(0.01)
        helpers[-1].kill()

    killer = Thread(target=kill)
    killer.start()
    with pytest.raises(TrainingError, match=r"exit code -9"):
        prepare(TrainSettings(data=(file,)), tokenizer)
    killer.join()
    assert [one for one in psutil.Process().children() if one not in before] == []
    assert not list((home / "cache" / "samples").glob("*[!k]"))  # a lock is left


def test_two_processes_at_once_make_one_table(tmp_path: Path, folder: Path, home: Path) -> None:
    file = write(tmp_path / "a.jsonl", rows(4000))
    children = [begin(folder, file, home) for _ in range(2)]
    (first, _), (second, _) = map(outcome, children)
    assert first == second
    assert len(list((home / "cache" / "samples").glob("[!.]*"))) == 1


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, folder: Path, home: Path) -> None:
    sizes = []
    for count in (4000, 16000):
        file = write(tmp_path / f"{count}.jsonl", rows(count, words=20))
        sizes.append(outcome(begin(folder, file, home))[1])
    # the rows' texts alone are 2.5 MB more, their samples as objects 60 MB
    assert sizes[1] < sizes[0] + 12_000_000


def test_a_cache_that_cannot_be_written_is_a_sentence(
    tmp_path: Path, tokenizer: ChatTokenizer, many: Path
) -> None:
    many.parent.mkdir(parents=True)
    many.write_text("a file where a folder belongs", "utf-8")
    with pytest.raises(ModelError, match="could not be written"):
        prepare(TrainSettings(data=(write(tmp_path / "a.jsonl", rows(30)),)), tokenizer)
