"""A disk that is really full: a small tmpfs, so these tests need the right to mount one."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers_hub import REPO, pulled, repository
from tests.hub_server import HubServer
from tunesmith.errors import DownloadError
from tunesmith.models.hub import Chosen, pull
from tunesmith.models.store import locate

both_hubs = pytest.mark.parametrize("source", ["hf", "modelscope"])

MB = 10**6


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Path]]:
    """Makes a home on a disk of so many megabytes."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(megabytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes * MB}", "tmpfs", str(place)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a small tmpfs is not permitted here (it needs root)")
        monkeypatch.setenv("TUNESMITH_HOME", str(place / "home"))
        return place

    yield mount
    subprocess.run(["umount", str(place)], check=False, capture_output=True)


@both_hubs
def test_a_disk_too_small_is_said_before(
    hub: HubServer, disk: Callable[[int], Path], tmp_path: Path, source: str
) -> None:
    hub.publish(REPO, repository(tmp_path / "repository", size=5 * MB))
    disk(20)
    with pytest.raises(DownloadError, match=r"needs 22 MB more .* \d\d MB are free"):
        pulled(f"{source}:{REPO}")
    assert not hub.file_requests()


@both_hubs
def test_a_disk_that_fills_meanwhile_keeps_old_version_and_half(
    hub: HubServer, disk: Callable[[int], Path], tmp_path: Path, source: str
) -> None:
    hub.publish(REPO, repository(tmp_path / "repository", size=1 * MB))
    place = disk(40)
    old = pulled(f"{source}:{REPO}")
    hub.publish(REPO, repository(tmp_path / "repository", seed=1, size=5 * MB))

    events = pull(f"{source}:{REPO}", update=True)
    assert isinstance(next(events), Chosen)
    filler = place / "filler"
    with filler.open("wb") as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(MB))
            file.flush()
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - 2 * MB)
    with pytest.raises(DownloadError, match="disk is full"):
        list(events)
    assert locate(f"{source}:{REPO}") == old

    filler.unlink()
    new = pulled(f"{source}:{REPO}", update=True)
    assert (new.path / "model.safetensors").stat().st_size == 5 * MB
    assert [seen.range for seen in hub.requests if seen.path.startswith("/cdn/")][-1]
