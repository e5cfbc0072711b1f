"""What a MODEL argument means, and that files are proven before they are loaded."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers_hub import REPO, pulled, repository
from tests.helpers_time import yardstick
from tests.hub_server import HubServer
from tunesmith.errors import DownloadError, ModelError, UsageError
from tunesmith.models import store
from tunesmith.models.lock import lock_model
from tunesmith.models.reference import parse
from tunesmith.models.store import LocalModel, locate

SPEC = f"hf:{REPO}"


@pytest.fixture
def model(hub: HubServer, home: Path, tmp_path: Path) -> LocalModel:
    """A small model, pulled into this test's home."""
    hub.publish(REPO, repository(tmp_path / "repository"))
    return pulled(SPEC)


def flip_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(200)
        byte = file.read(1)
        file.seek(200)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.usefixtures("home")
def test_a_model_not_here_says_how_to_get_it() -> None:
    with pytest.raises(ModelError, match="tunesmith pull qwen2-7b-instruct"):
        locate("Qwen2-7B-Instruct")
    with pytest.raises(ModelError, match="tunesmith pull modelscope:owner/name@v1"):
        locate("modelscope:owner/name@v1")


@pytest.mark.usefixtures("home")
def test_an_unknown_name_suggests_near_ones() -> None:
    with pytest.raises(UsageError, match="Did you mean qwen2-7b-instruct"):
        locate("qwen2-7b-instrct")
    with pytest.raises(UsageError, match=r"'nothing like it' is not in the catalog.*name\.$"):
        locate("nothing like it")


def test_a_changed_byte_is_found_and_repaired(
    model: LocalModel, hub: HubServer, tmp_path: Path
) -> None:
    hub.publish(REPO, repository(tmp_path / "repository", seed=1))  # the repair stays at its commit
    flip_byte(model.path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model.safetensors .*tunesmith pull hf:maker"):
        locate(SPEC)
    asked = len(hub.file_requests())
    assert pulled(SPEC) == locate(SPEC) == model
    again = hub.file_requests()[asked:]
    assert {seen.path.rpartition("/")[2] for seen in again} == {"model.safetensors"}


def test_a_missing_file_is_found(model: LocalModel) -> None:
    (model.path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        locate(SPEC)


def test_the_stamp_spares_the_second_hashing(model: LocalModel) -> None:
    weights = model.path / "model.safetensors"
    before = weights.stat()
    flip_byte(weights)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert locate(SPEC) == model  # trusted by size and time: this is what makes a start fast
    (model.path / "stamp.json").unlink()
    with pytest.raises(ModelError):
        locate(SPEC)


def test_a_copied_model_is_hashed_once_more(model: LocalModel) -> None:
    os.utime(model.path / "model.safetensors")
    assert locate(SPEC) == model
    stamp = (model.path / "stamp.json").stat().st_mtime_ns
    assert locate(SPEC) == model
    assert (model.path / "stamp.json").stat().st_mtime_ns == stamp


def test_a_broken_manifest_is_one_sentence(model: LocalModel) -> None:
    (model.path / "manifest.json").write_text('{"files": 3}')
    with pytest.raises(ModelError, match="delete its folder"):
        locate(SPEC)


def test_locating_is_fast_and_loads_no_client(model: LocalModel, home: Path) -> None:
    locate(SPEC)
    start = time.thread_time()
    locate(SPEC)
    assert time.thread_time() - start < yardstick() / 2
    code = (
        "import sys; from tunesmith.models.store import locate; locate(sys.argv[1]);"
        "print([name for name in ('huggingface_hub', 'modelscope_hub', 'requests', 'torch')"
        " if name in sys.modules])"
    )
    env = os.environ | {"TUNESMITH_HOME": str(home)}
    loaded = subprocess.check_output([sys.executable, "-c", code, SPEC], env=env, text=True)
    assert loaded == "[]\n"


def test_the_same_weights_anywhere_are_the_same_model(model: LocalModel, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model.path, copy)
    local = locate(str(copy))
    assert local.sha256 == model.sha256
    assert (local.source, local.path, local.name) == ("local", copy, "copy")
    flip_byte(copy / "model.safetensors")
    assert locate(str(copy)).sha256 != model.sha256


@pytest.mark.usefixtures("home")
def test_a_gguf_file_and_a_folder_that_holds_it(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "tiny.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    alone, inside = locate(str(file)), locate(str(file.parent))
    assert alone == inside
    assert alone.is_gguf and alone.path == file and alone.name == "tiny"
    (file.parent / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"other\.gguf, tiny\.gguf"):
        locate(str(file.parent))


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["config.json", "pytorch_model.bin"], "pickled"),
        (["model.safetensors"], r"no config\.json"),
        (["notes.md"], "holds no model"),
    ],
)
def test_a_folder_without_a_model(tmp_path: Path, names: list[str], said: str) -> None:
    for name in names:
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_text("x")
    with pytest.raises(ModelError, match=said):
        locate(str(tmp_path / "folder"))


@pytest.mark.usefixtures("home")
def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"not a \.gguf file"):
        locate(str(tmp_path / "weights.pt"))


def test_listing_and_removing(model: LocalModel) -> None:
    (listed,) = store.installed()
    assert (listed.name, listed.source, listed.repo) == (SPEC, "hf", REPO)
    assert listed.revision == model.revision and listed.licence == "apache-2.0"
    assert listed.size > 400_000
    assert store.remove(SPEC) > listed.size  # the manifest goes too
    assert store.installed() == [] and not model.path.exists()
    with pytest.raises(ModelError, match="not on this machine"):
        store.remove(SPEC)


def test_removing_takes_a_cut_download_too(model: LocalModel, hub: HubServer, home: Path) -> None:
    hub.faults.flips = 99
    with pytest.raises(DownloadError):
        pulled(f"modelscope:{REPO}")
    assert store.remove(f"modelscope:{REPO}") > 0
    assert not list(home.glob("models/.modelscope*"))


def test_what_is_being_pulled_is_not_removed(model: LocalModel) -> None:
    lock = lock_model(model.path)
    assert lock is not None
    with lock, pytest.raises(ModelError, match="another process"):
        store.remove(SPEC)
    assert store.remove(SPEC)


def test_removing_never_takes_a_path(model: LocalModel, tmp_path: Path) -> None:
    folder = repository(tmp_path / "mine")
    for name in (str(folder), str(model.path), "..", str(model.path.parent)):
        with pytest.raises(UsageError, match="not removed"):
            store.remove(name)
    assert folder.exists() and model.path.exists()


@given(st.text(max_size=40), st.sampled_from(["hf:", "modelscope:", "hf:a/b@", "hf:a/b#"]))
def test_any_text_is_a_reference_with_one_safe_folder_or_is_refused(text: str, prefix: str) -> None:
    try:
        reference = parse(prefix + text)
    except UsageError:
        return
    assert str(reference) == prefix + text
    assert "/" not in reference.folder and "\0" not in reference.folder
    assert not reference.folder.startswith(".")


def test_different_references_have_different_short_folders() -> None:
    long = "b" * 90
    specs = [
        "hf:a/b",
        "modelscope:a/b",
        "hf:a/b@main",
        "hf:a/b@x/y.gguf",
        "hf:a/b@x#y.gguf",
        "hf:a/b#y.gguf",
        f"hf:{long}/{long}@{long}",
        f"hf:{long}/{long}@{long}#x.gguf",
        f"hf:{long}/{long}@{long}#y.gguf",
    ]
    folders = [parse(spec).folder for spec in specs]
    assert len({folder.lower() for folder in folders}) == len(specs)
    assert max(map(len, folders)) <= 180
