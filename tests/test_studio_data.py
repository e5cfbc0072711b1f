"""The data page: writing an identity set, bringing files, and what is wrong with them."""

from pathlib import Path

import pytest

from tests.helpers_data import conversations
from tests.helpers_page import visit

EMPTY = {
    "en": "No data is here yet. Write down who your assistant is, or bring a file.",
    "zh": "这里还没有数据。写下你的助手是谁，或者上传一个文件。",
}
BAD_ROW = '{"messages": [{"role": "user", "content": "Who?"}]}\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("language", EMPTY)
def test_without_data(language: str) -> None:
    page = visit("data", language)
    assert [info.value for info in page.info] == [EMPTY[language]]


@pytest.mark.parametrize(
    ("language", "said"), [("en", "{0} of {0} rows"), ("zh", "{0} 行中有 {0} 行")]
)
def test_an_identity_set_is_written_and_found_good(language: str, said: str) -> None:
    page = visit("data", language)
    page.text_input[0].set_value("Momo")
    page.button[0].click().run()
    assert not page.exception
    rows = conversations(Path("data/me.jsonl"))
    assert said.format(len(rows)) in page.success[-1].value
    assert rows[0].identity is not None and rows[0].identity.name == "Momo"


def test_nothing_is_overwritten(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data/me.jsonl").write_text(BAD_ROW)
    page = visit("data")
    page.button[0].click().run()
    assert "data/me.jsonl" in page.error[0].value
    assert (folder / "data/me.jsonl").read_text() == BAD_ROW


@pytest.mark.parametrize("name", ["../me.jsonl", "/tmp/me.jsonl", ".jsonl", "me.exe", "me", ""])
def test_a_name_that_leads_elsewhere_is_refused(name: str, folder: Path) -> None:
    page = visit("data")
    page.text_input[2].set_value(name)
    page.button[0].click().run()
    assert "is no name for a data file" in page.error[0].value
    assert not list(folder.rglob("*me*"))


def test_every_finding_is_shown_with_its_fix(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data/mine.jsonl").write_text(BAD_ROW)
    page = visit("data")
    assert page.warning[0].value == "0 of 1 rows can be trained on."
    (findings,) = [one.value for one in page.dataframe if "Fix" in one.value]
    (row,) = findings.to_dict("records")
    assert row["Place"].endswith("mine.jsonl:1") or "mine.jsonl" in row["Place"]
    assert row["Problem"] and row["Fix"]


PASTED = {
    '{"instruction": "Q", "output": "A"}\n{"instruction": "R", "output": "B"}': "mine.jsonl",
    '[{"instruction": "Q", "output": "A"}]': "mine.json",
    '{\n "instruction": "Q",\n "output": "A"\n}': "mine.json",
    "instruction,output\nQ,A": "mine.csv",
}


@pytest.mark.parametrize("text", PASTED)
def test_pasted_text_is_kept_and_checked(text: str) -> None:
    page = visit("data")
    page.text_area[0].set_value(text)
    next(field for field in page.text_input if field.value == "pasted").set_value("mine")
    next(button for button in page.button if button.label == "Keep it").click().run()
    assert not page.exception
    file = Path("data") / PASTED[text]
    assert page.selectbox[0].value == str(file)
    assert file.read_text() == text
    assert page.success[0].value.endswith("rows can be trained on.")


def test_pasted_nonsense_is_a_finding() -> None:
    page = visit("data")
    page.text_area[0].set_value("no data at all")
    next(button for button in page.button if button.label == "Keep it").click().run()
    assert "0 of" in page.warning[0].value
    assert Path("data/pasted.csv").read_text() == "no data at all"


@pytest.mark.parametrize(
    ("language", "fix"), [("en", "Fix what is certain (2)"), ("zh", "修好有把握的问题（2）")]
)
def test_what_is_certain_is_fixed_in_a_new_file(language: str, fix: str, folder: Path) -> None:
    (folder / "data").mkdir()
    row = '{"instruction": "Q", "output": "A"}\n'
    bad = f"\ufeff{row}{row}{BAD_ROW}"
    (folder / "data/mine.jsonl").write_text(bad, encoding="utf-8")
    page = visit("data", language)
    next(button for button in page.button if button.label == fix).click().run()
    assert not page.exception
    assert page.selectbox[0].value == "data/mine-fixed.jsonl"
    assert Path("data/mine-fixed.jsonl").read_text() == row + BAD_ROW
    assert Path("data/mine.jsonl").read_text(encoding="utf-8") == bad
    assert not [button for button in page.button if fix[:3] in button.label]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"PAR1" + bytes(100)),
        ("a.jsonl", bytes(range(256)) * 8),
        ("a.json", b'[{"instruction": "Q", '),
        ("a.csv", "问,答\n".encode("gb18030")),
        ("a.json", b""),
    ],
)
def test_a_broken_upload_is_a_finding(name: str, content: bytes) -> None:
    page = visit("data")
    page.file_uploader[0].upload(name, content).run()
    next(button for button in page.button if button.label == "Keep it").click().run()
    assert not page.exception
    assert not page.error
    assert page.selectbox[0].value == f"data/{name}"
    assert any("Fix" in table.value for table in page.dataframe)
    assert Path(f"data/{name}").read_bytes() == content


def test_an_upload_replaces_nothing(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data/a.jsonl").write_text(BAD_ROW)
    page = visit("data")
    page.file_uploader[0].upload("a.jsonl", b"{}").run()
    next(button for button in page.button if button.label == "Keep it").click().run()
    assert "data/a.jsonl exists already" in page.error[0].value
    assert (folder / "data/a.jsonl").read_text() == BAD_ROW
