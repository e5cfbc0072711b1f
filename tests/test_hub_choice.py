"""Which source a model comes from, and which of its files."""

from pathlib import Path

import pytest

from tests.helpers_hub import REPO, pulled, repository
from tests.hub_server import HubServer
from tunesmith.errors import DownloadError, UsageError
from tunesmith.language import set_language
from tunesmith.models.hub import Chosen, Notice, Ready, pull

pytestmark = pytest.mark.usefixtures("home")

CATALOG_REPO = "Qwen/Qwen2-7B-Instruct"


@pytest.fixture
def published(hub: HubServer, tmp_path: Path) -> HubServer:
    hub.publish(CATALOG_REPO, repository(tmp_path / "repository"))
    return hub


def chosen(name: str, source: str | None = None) -> str:
    return next(e.source for e in pull(name, source=source) if isinstance(e, Chosen))


def test_a_catalog_name_comes_from_hugging_face_by_default(published: HubServer) -> None:
    assert chosen("qwen2-7b-instruct") == "hf"


def test_chinese_speakers_are_sent_to_modelscope_first(published: HubServer) -> None:
    from contextvars import copy_context

    def ask() -> str:
        set_language("zh")
        return chosen("Qwen2-7B-Instruct")

    assert copy_context().run(ask) == "modelscope"


def test_the_source_can_be_asked_for(published: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen("qwen2-7b-instruct", "modelscope") == "modelscope"
    with pytest.raises(UsageError, match="it is on: hf, modelscope"):
        list(pull("qwen2-7b-instruct", source="pypi"))
    monkeypatch.setenv("TUNESMITH_HUB", "nowhere")
    with pytest.raises(UsageError, match="nowhere"):
        list(pull("qwen2-1.5b-instruct"))


def test_the_environment_names_a_preferred_source(
    published: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_HUB", "modelscope")
    assert chosen("qwen2-7b-instruct") == "modelscope"


def test_an_unreachable_source_is_told_and_the_next_one_serves(
    published: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    events = list(pull("qwen2-7b-instruct"))
    assert events[0] == Notice("Hugging Face cannot be reached.")
    assert isinstance(events[1], Chosen) and events[1].source == "modelscope"
    assert isinstance(events[-1], Ready)


def test_a_cut_download_goes_on_elsewhere_when_its_source_is_gone(
    published: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.faults.flips = 99
    with pytest.raises(DownloadError, match="checksum"):
        pulled("qwen2-7b-instruct")
    published.faults.flips = 0
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert pulled("qwen2-7b-instruct").source == "modelscope"


def test_a_source_without_the_model_is_told_and_the_next_one_serves(
    published: HubServer,
) -> None:
    published.faults.gated = {CATALOG_REPO}
    events = pull("qwen2-7b-instruct")
    first = next(events)
    assert isinstance(first, Notice) and "accept its licence" in first.text
    published.faults.gated = set()
    assert isinstance(list(events)[-1], Ready)


def test_with_no_source_the_error_names_them_all(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"Hugging Face .*ModelScope .*cannot be reached"):
        pulled("qwen2-7b-instruct")


def test_something_that_is_no_hub_is_one_sentence(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/cdn")
    with pytest.raises(DownloadError, match="no usable answer"):
        list(pull("qwen2-7b-instruct", source="hf"))


def publish(hub: HubServer, folder: Path, *names: str) -> None:
    folder.mkdir()
    for name in ("config.json", *names):
        (folder / name).write_text(name)
    hub.publish(REPO, folder)


@pytest.mark.parametrize("source", ["hf", "modelscope"])
def test_of_several_gguf_files_one_must_be_named(
    hub: HubServer, tmp_path: Path, source: str
) -> None:
    publish(hub, tmp_path / "repo", "m-q4.gguf", "m-q8.gguf")
    with pytest.raises(DownloadError, match=f"m-q4.gguf, m-q8.gguf.*{source}:{REPO}#m-q4.gguf"):
        pulled(f"{source}:{REPO}")
    model = pulled(f"{source}:{REPO}#m-q8.gguf")
    assert model.is_gguf and model.path.read_text() == "m-q8.gguf"
    with pytest.raises(DownloadError, match="name one"):
        pulled(f"{source}:{REPO}#m-q5.gguf")


def test_a_split_gguf_comes_whole(hub: HubServer, tmp_path: Path) -> None:
    publish(hub, tmp_path / "repo", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
    model = pulled(f"hf:{REPO}")
    assert model.path.name == "m-00001-of-00002.gguf"
    assert (model.path.parent / "m-00002-of-00002.gguf").exists()


def test_safetensors_are_preferred_and_duplicates_left(hub: HubServer, tmp_path: Path) -> None:
    publish(hub, tmp_path / "repo", "model.safetensors", "consolidated.safetensors", "m.gguf")
    names = {path.name for path in pulled(f"hf:{REPO}").path.iterdir()}
    assert "model.safetensors" in names
    assert not names & {"consolidated.safetensors", "m.gguf"}


def test_a_listing_without_all_parts_is_refused(hub: HubServer, tmp_path: Path) -> None:
    parts = [f"model-0000{part}-of-00003.safetensors" for part in (1, 2, 3)]
    publish(hub, tmp_path / "repo", *parts)
    hub.faults.omit = [parts[1]]
    with pytest.raises(DownloadError, match="lists 2 of 3 parts"):
        pulled(f"hf:{REPO}")
    hub.faults.omit = []
    assert pulled(f"hf:{REPO}").sha256


@pytest.mark.parametrize(("name", "said"), [("w.bin", "pickled"), ("notes.txt", "no safetensors")])
def test_without_usable_weights_nothing_is_fetched(
    hub: HubServer, tmp_path: Path, name: str, said: str
) -> None:
    publish(hub, tmp_path / "repo", name)
    with pytest.raises(DownloadError, match=said):
        pulled(f"hf:{REPO}")
    assert not hub.file_requests()
