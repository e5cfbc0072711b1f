"""Every sentence tunesmith says has a translation, and each translation a sentence."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from threading import Thread

import pytest
from jinja2 import Environment, nodes

import tunesmith
from tunesmith.apps.menu import COMMANDS, GROUPS
from tunesmith.language import LOCALE_DIR, current_language, set_language, t

SOURCE = Path(tunesmith.__file__).parent
# Where each call keeps its sentence: the position, or the keyword.
CALLS: dict[str, int | str] = {"t": 0, "setting": 1, "Parameter": "help"}
# the lookup itself; menu and flag texts
SENTENCES_FROM_ELSEWHERE = {"language.py", "help.py", "settings_form.py"}


def _sentences(file: Path) -> Iterator[tuple[str, str]]:
    """Sentences said in a file, each with where; a call whose sentence is no literal fails."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        place = CALLS.get(node.func.id)
        if place is None:
            continue
        where = f"{file.relative_to(SOURCE)}:{node.lineno}"
        argument = _argument(node, place)
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            yield argument.value, where
        elif node.func.id != "Parameter" and file.name not in SENTENCES_FROM_ELSEWHERE:
            pytest.fail(f"{where}: {node.func.id}() takes a plain literal")


def _sentences_of_template(file: Path) -> Iterator[tuple[str, str]]:
    for call in Environment().parse(file.read_text(encoding="utf-8")).find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == "t":
            where = f"{file.relative_to(SOURCE)}:{call.lineno}"
            assert isinstance(call.args[0], nodes.Const), f"{where}: t() takes a plain literal"
            yield call.args[0].value, where


def _argument(node: ast.Call, place: int | str) -> ast.expr | None:
    if isinstance(place, int):
        return node.args[place] if len(node.args) > place else None
    return next((keyword.value for keyword in node.keywords if keyword.arg == place), None)


def _all_sentences() -> dict[str, str]:
    found = {command.summary: f"menu: {name}" for name, command in COMMANDS.items()}
    found |= {text: f"menu: {name}" for name, text in GROUPS.items()}
    for file in SOURCE.rglob("*.py"):
        found |= dict(_sentences(file))
    for file in SOURCE.rglob("*.html"):
        found |= dict(_sentences_of_template(file))
    return found


def _catalogues() -> Iterator[tuple[Path, dict[str, str]]]:
    for file in sorted(LOCALE_DIR.glob("zh/*.json")):
        yield file, json.loads(file.read_text(encoding="utf-8"))


def _translations() -> dict[str, str]:
    return {english: chinese for _, part in _catalogues() for english, chinese in part.items()}


def _placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(text) if name is not None}


def test_every_sentence_is_translated() -> None:
    translated = _translations()
    missing = [f"{where}: {s}" for s, where in _all_sentences().items() if s not in translated]
    assert not missing, "no Chinese for:\n" + "\n".join(missing)


def test_no_translation_is_stale() -> None:
    said = _all_sentences()
    stale = [f"{file.name}: {s}" for file, part in _catalogues() for s in part if s not in said]
    assert not stale, "no longer said:\n" + "\n".join(stale)


def test_translations_keep_the_placeholders() -> None:
    wrong = [
        f"{english}\n  {chinese}"
        for english, chinese in _translations().items()
        if _placeholders(english) != _placeholders(chinese)
    ]
    assert not wrong, "\n".join(wrong)


def test_one_sentence_has_one_translation() -> None:
    seen: dict[str, tuple[str, str]] = {}
    for file, part in _catalogues():
        for english, chinese in part.items():
            first, other = seen.setdefault(english, (file.name, chinese))
            assert other == chinese, f"{english!r} differs in {first} and {file.name}"


def test_chinese_reads_as_chinese() -> None:
    """Chinese characters, and full-width punctuation after them."""
    half_width = re.compile(r"[\u4e00-\u9fff][,;:?!](?![/\w])")
    wrong = [
        chinese
        for english, chinese in _translations().items()
        if half_width.search(chinese)
        or (
            re.search(r"[a-z]{3} [a-z]{2}", _bare(english))
            and not re.search("[\u4e00-\u9fff]", chinese)
        )
    ]
    assert not wrong, "\n".join(wrong)


def _bare(text: str) -> str:
    return re.sub(r"\{[^}]*\}|`[^`]*`", "", text)


def test_catalogue_files_hold_no_key_twice() -> None:
    def distinct(pairs: list[tuple[str, str]]) -> dict[str, str]:
        keys = [key for key, _ in pairs]
        assert len(keys) == len(set(keys)), [key for key in keys if keys.count(key) > 1]
        return dict(pairs)

    for file in LOCALE_DIR.glob("zh/*.json"):
        json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=distinct)


def test_t_fills_the_translated_sentence() -> None:
    def speak() -> None:
        set_language("zh")
        heard.append(t("{flag} is given twice.", flag="--seed"))
        set_language("en")
        heard.append(t("{flag} is given twice.", flag="--seed"))

    heard: list[str] = []
    thread = Thread(target=speak)  # a context of its own: the other tests keep their language
    thread.start()
    thread.join()
    assert heard == ["--seed 写了两次。", "--seed is given twice."]


def test_a_sentence_without_translation_stays_english() -> None:
    assert t("{x} was never translated", x=3) == "3 was never translated"


def test_values_are_not_read_as_placeholders() -> None:
    assert t("{flag} is given twice.", flag="{name}").startswith("{name} ")


def test_an_unknown_language_is_refused() -> None:
    before = current_language()
    with pytest.raises(ValueError, match="fr"):
        set_language("fr")
    assert current_language() == before


@pytest.mark.parametrize(
    ("variables", "language"),
    [
        ({"TUNESMITH_LANG": "zh", "LC_ALL": "en_US.UTF-8"}, "zh"),
        ({"LC_ALL": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, "en"),
    ],
)
def test_the_environment_chooses(
    variables: dict[str, str], language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.language import _environment_language

    for name in ("TUNESMITH_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _environment_language.cache_clear()
    try:
        assert _environment_language() == language
    finally:
        _environment_language.cache_clear()
