"""Conversations of the page outlive refreshes, crashes and full disks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers_data import conversations
from tunesmith.apps.studio.history import History, as_json, as_markdown
from tunesmith.errors import UsageError

SCRIPT = """
import sys
from itertools import count
from pathlib import Path
from tunesmith.apps.studio.history import History
history = History(Path(sys.argv[1]))
id = history.begin("Count", "a-model", None)
print(id, flush=True)
for number in count():
    history.add(id, "user", str(number) * 1000)
"""


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "new" / "folder" / "conversations.sqlite")


def talk(history: History, question: str, answer: str, system: str | None = None) -> str:
    id = history.begin(question, "a-model", system)
    history.add(id, "user", question)
    history.add(id, "assistant", answer, tokens_per_second=9.5)
    return id


def test_what_was_said_is_there_in_order(history: History) -> None:
    id = talk(history, "Who?", "Me.")
    assert [(turn.role, turn.content) for turn in history.turns(id)] == [
        ("user", "Who?"), ("assistant", "Me."),
    ]  # fmt: skip
    assert history.turns(id)[1].details == {"tokens_per_second": 9.5}
    history.cut(id, 1)
    history.add(id, "assistant", "You.")
    assert [turn.content for turn in history.turns(id)] == ["Who?", "You."]


def test_the_newest_comes_first_and_is_found_by_any_word(history: History) -> None:
    first, second = talk(history, "100% of it?", "雨"), talk(history, "What " * 20, "snow")
    assert [one.id for one in history.conversations()] == [second, first]
    assert history.conversations()[0].title == "What What What What What What What What…"
    history.add(first, "user", "Again")
    assert [one.id for one in history.conversations()] == [first, second]
    for word, found in (("雨", [first]), ("SNOW", [second]), ("100%", [first]), ("%", [first]),
                        ("_", []), ("nothing", [])):  # fmt: skip
        assert [one.id for one in history.conversations(word)] == found


def test_renamed_and_deleted(history: History) -> None:
    id = talk(history, "Who?", "Me.")
    history.rename(id, "  ")
    history.rename(id, " Mine ")
    history.settle(id, "another", "Be kind.")
    found = history.find(id)
    assert found is not None
    assert (found.title, found.target, found.system) == ("Mine", "another", "Be kind.")
    history.delete(id)
    history.add(id, "assistant", "too late")
    assert history.find(id) is None
    assert history.turns(id) == []


def test_an_export_is_a_training_row(history: History, tmp_path: Path) -> None:
    id = talk(history, "Who?", "Me.", system="Be kind.")
    conversation = history.find(id)
    assert conversation is not None
    file = tmp_path / "talk.jsonl"
    whole = json.loads(as_json(conversation, history.turns(id)))
    file.write_text(json.dumps(whole) + "\n")
    (row,) = conversations(file)
    assert row.system == "Be kind."
    assert [message.content for message in row.messages[1:]] == ["Who?", "Me."]


def test_nothing_in_a_markdown_export_acts(history: History) -> None:
    attack = "```\n![x](http://evil/x.png)\n<script>1</script>\n````\n[a](javascript:1)"
    id = talk(history, "<b>[x](javascript:1)", attack)
    conversation = history.find(id)
    assert conversation is not None
    text = as_markdown(conversation, history.turns(id))
    assert f"`````\n{attack}\n`````" in text
    assert text.startswith("# &lt;b>\\[x](javascript:1)\n")


def test_a_killed_writer_leaves_whole_turns(tmp_path: Path) -> None:
    file = tmp_path / "conversations.sqlite"
    for _ in range(5):
        writer = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(file)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        id = writer.stdout.readline().strip()
        while len(History(file).turns(id)) < 5:
            time.sleep(0.01)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        turns = History(file).turns(id)
        assert [turn.content for turn in turns] == [str(n) * 1000 for n in range(len(turns))]
        History(file).add(id, "assistant", "It goes on.")


def test_a_file_that_is_no_history_is_named(tmp_path: Path) -> None:
    file = tmp_path / "conversations.sqlite"
    file.write_bytes(b"no database, but long enough to look like one" * 50)
    with pytest.raises(UsageError, match=r"conversations\.sqlite cannot be read or written: file"):
        History(file).conversations()
