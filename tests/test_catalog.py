"""The catalog's rows can be true: names, references, sizes, memory."""

import pytest

from tunesmith.models import catalog
from tunesmith.models.catalog import CATALOG, GIB, Entry
from tunesmith.models.reference import parse

every_entry = pytest.mark.parametrize("entry", CATALOG.values(), ids=CATALOG)


@every_entry
def test_a_row_is_well_formed(entry: Entry) -> None:
    assert entry.name == entry.name.lower() and "/" not in entry.name
    assert entry.licence and entry.sources
    assert len({item.source for item in entry.sources}) == len(entry.sources)
    for reference in entry.sources:
        assert reference.revision
        if reference.source != "pypi":
            assert parse(str(reference)) == reference


@every_entry
def test_a_name_states_the_size(entry: Entry) -> None:
    words = [word for word in entry.name.split("-") if word[:-1].replace(".", "").isdigit()]
    for word in words:
        if word[-1] in "mb":
            stated = float(word[:-1]) * (1e6 if word[-1] == "m" else 1e9)
            assert stated * 0.9 < entry.parameters < stated * 1.5


@every_entry
def test_memory_grows_from_download_to_tuning(entry: Entry) -> None:
    assert entry.size < entry.chat_memory < entry.tune_memory


def test_sizes_people_know() -> None:
    seven = CATALOG["qwen2-7b-instruct"]
    assert 15e9 < seven.size < 15.5e9
    assert 15 * GIB < seven.chat_memory < 17 * GIB
    assert 17 * GIB < seven.tune_memory < 20 * GIB
    assert CATALOG["smollm2-135m"].chat_memory < 0.5 * GIB


def test_licences_that_are_not_apache() -> None:
    assert "Research" in CATALOG["qwen2.5-3b-instruct"].licence
    assert CATALOG["qwen2-72b-instruct"].licence != "Apache-2.0"
    assert "Llama 3.1" in CATALOG["llama-3.1-8b-instruct"].licence


def test_what_was_promised_is_there() -> None:
    for family, smallest, largest in (("qwen2", "0.5b", "72b"), ("qwen2.5", "0.5b", "72b")):
        assert f"{family}-{smallest}-instruct" in CATALOG
        assert f"{family}-{largest}-instruct" in CATALOG
    for prefix in ("qwen3", "smollm2", "smollm3", "llama-3", "mistral", "gemma"):
        assert any(name.startswith(prefix) for name in CATALOG)


def test_finding() -> None:
    assert catalog.find("Qwen2-7B-Instruct") is CATALOG["qwen2-7b-instruct"]
    assert catalog.find("qwen2") is None
    assert catalog.closest("qwen2-7b-instrct")[0] == "qwen2-7b-instruct"
