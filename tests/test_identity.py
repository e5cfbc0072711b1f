"""The who-are-you set: complete, in the question's language, apart from what is held out."""

import re
import unicodedata
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path

import pytest

from tests.helpers_data import load
from tunesmith.data.checks import check
from tunesmith.data.identity import default_system, held_out, identity_rows, write_identity
from tunesmith.data.messages import Identity
from tunesmith.errors import UsageError

NAME, AUTHOR = "不要葱姜蒜", "Datawhale"
ALIKE = 0.8


def plain(text: str) -> str:
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).casefold())


def alike(first: str, second: str) -> float:
    return SequenceMatcher(None, plain(first), plain(second), autojunk=False).ratio()


def questions(language: str) -> list[str]:
    rows = identity_rows(NAME, AUTHOR, languages=(language,))
    asked = [turn.content for row in rows for turn in row.messages if turn.role == "user"]
    return list(dict.fromkeys(asked))


def is_chinese(text: str) -> bool:
    return bool(re.search(r"[\u4e00-\u9fff]", text.replace(NAME, "")))


@pytest.mark.parametrize("language", ["zh", "en"])
def test_there_are_many_phrasings_and_enough_held_out(language: str) -> None:
    assert len(questions(language)) >= 100
    assert len(held_out((language,))) >= 20
    assert len(set(held_out((language,)))) == len(held_out((language,)))


@pytest.mark.parametrize("language", ["zh", "en"])
def test_no_trained_question_is_like_a_held_out_one(language: str) -> None:
    trained = questions(language)
    assert not set(map(plain, trained)) & set(map(plain, held_out()))
    for asked in held_out((language,)):
        closest = max(trained, key=lambda question: alike(asked, question))
        assert alike(asked, closest) < ALIKE, (asked, closest)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_each_question_is_asked_once_half_of_them_behind_the_system_prompt(language: str) -> None:
    rows = identity_rows(NAME, AUTHOR, languages=(language,))
    first = [row.messages[row.system is not None].content for row in rows]
    assert len(set(map(plain, first))) == len(rows)
    systems = Counter(row.system for row in rows)
    assert set(systems) == {None, default_system(NAME, language)}
    assert abs(systems[None] - len(rows) / 2) <= 2


def test_each_answer_of_a_group_is_given_with_and_without_the_system_prompt() -> None:
    told: dict[str, set[bool]] = {}
    for row in identity_rows(NAME, AUTHOR):
        told.setdefault(row.messages[-1].content, set()).add(row.system is not None)
    often = [both for answer, both in told.items() if NAME in answer and AUTHOR in answer]
    assert sum(both == {True, False} for both in often) > len(often) * 0.8


def test_answers_name_the_assistant_in_the_language_of_the_question() -> None:
    rows = identity_rows(NAME, AUTHOR)
    for row in rows:
        question, answer = row.messages[-2].content, row.messages[-1].content
        assert NAME in answer
        assert is_chinese(answer) == is_chinese(question), question
        assert "{" not in answer
        assert row.identity == Identity(NAME, AUTHOR)
    answers = [row.messages[-1].content for row in rows]
    assert sum(AUTHOR in answer for answer in answers) > len(answers) / 2
    assert len(set(answers)) >= 16


def test_questions_about_the_maker_are_answered_with_the_maker() -> None:
    answers = {
        row.messages[-2].content: row.messages[-1].content for row in identity_rows("N", "M")
    }
    for question in ("是谁开发了你？", "那又是谁做的你呢？", "Who made you?", "who trained you"):
        assert "M" in answers[question]
    for question in ("你是ChatGPT吗？", "Are you Qwen?"):
        assert answers[question].startswith(("不", "No"))


def test_the_written_set_is_clean_and_read_back_whole(tmp_path: Path) -> None:
    path = tmp_path / "identity.jsonl"
    count = write_identity(path, NAME, AUTHOR)
    assert check([path]).findings == ()
    made = identity_rows(NAME, AUTHOR)
    found = load([path])
    assert count == len(made) == len(found)
    assert [(row.messages, row.identity) for row in found] == [
        (row.messages, row.identity) for row in made
    ]
    with pytest.raises(UsageError):
        write_identity(path, NAME, AUTHOR)
    first = path.read_bytes()
    write_identity(path, NAME, AUTHOR, overwrite=True)
    assert path.read_bytes() == first


def test_one_language_and_a_system_prompt_of_ones_own() -> None:
    rows = identity_rows(NAME, AUTHOR, languages=("en",), system="Speak like a pirate.")
    assert {row.system for row in rows} == {None, "Speak like a pirate."}
    assert not any(is_chinese(row.messages[-1].content) for row in rows)


@pytest.mark.parametrize(
    "name",
    ['O"Neil\\', "🦊 小狐狸 👨‍👩‍👧", "{}", "{author}", "{name", "%s", "<b>&amp;</b>", "x" * 64],
)
def test_any_printable_name_is_taken_as_it_stands(tmp_path: Path, name: str) -> None:
    path = tmp_path / "identity.jsonl"
    write_identity(path, f"  {name} ", AUTHOR)
    for row in load([path]):
        assert name in row.messages[-1].content
        assert row.identity == Identity(name, AUTHOR)


@pytest.mark.parametrize("bad", ["", "  ", "a\nb", "a\x1b[0m", "x" * 65, "{{name}}", "\ud800"])
def test_a_name_that_cannot_be_said_is_refused(bad: str) -> None:
    with pytest.raises(UsageError, match="--name"):
        identity_rows(bad, AUTHOR)
    with pytest.raises(UsageError, match="--author"):
        identity_rows(NAME, bad)


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(UsageError, match="fr"):
        identity_rows(NAME, AUTHOR, languages=("fr",))
