"""Pulling from both hubs through their real clients, with everything that goes wrong on the way."""

import hashlib
import logging
import signal
import time
import traceback
from pathlib import Path

import pytest

from tests.helpers_hub import (
    REPO,
    WEIGHTS,
    partial_file,
    pull_process,
    pulled,
    repository,
)
from tests.hub_server import HubServer
from tunesmith.errors import DownloadError, ModelError, UsageError
from tunesmith.models.fetch import Progress
from tunesmith.models.hub import Chosen, Notice, Ready, pull
from tunesmith.models.store import locate

pytestmark = pytest.mark.usefixtures("home")

both_hubs = pytest.mark.parametrize("source", ["hf", "modelscope"])


@pytest.fixture
def content(hub: HubServer, tmp_path: Path) -> bytes:
    """Publishes the small model; what its weights are."""
    folder = repository(tmp_path / "repository")
    hub.publish(REPO, folder)
    return (folder / "model.safetensors").read_bytes()


def interrupt(spec: str, after: int = 100_000) -> None:
    """Stop a pull once some bytes are here, as Ctrl-C does."""
    events = pull(spec)
    for event in events:
        if isinstance(event, Progress) and event.done > after:
            break
    events.close()  # type: ignore[attr-defined]


def weight_ranges(hub: HubServer) -> list[str | None]:
    """The Range header of each request for the weights' bytes."""
    return [seen.range for seen in hub.requests if seen.path.startswith("/cdn/")]


@both_hubs
def test_pull_brings_the_files_wanted_and_no_others(
    hub: HubServer, content: bytes, source: str
) -> None:
    events = list(pull(f"{source}:{REPO}"))
    model = locate(f"{source}:{REPO}")
    assert isinstance(events[0], Chosen)
    assert events[0].total_bytes > WEIGHTS and events[0].licence == "apache-2.0"
    assert events[-1] == Ready(model)
    names = {path.name for path in model.path.iterdir()}
    assert names == {
        "config.json",
        "tokenizer.json",
        "LICENSE",
        "model.safetensors",
        "manifest.json",
        "stamp.json",
    }
    assert (model.path / "model.safetensors").read_bytes() == content
    assert model.revision == hub.repos[REPO][-1].sha
    *_, progress = (event for event in events if isinstance(event, Progress))
    assert progress.done == progress.total == events[0].total_bytes


@both_hubs
def test_files_with_the_same_content_do_not_meet(
    hub: HubServer, tmp_path: Path, source: str
) -> None:
    folder = repository(tmp_path / "repository")
    same = (folder / "model.safetensors").read_bytes()
    for name in ("a.json", "b.json", "c.json"):
        (folder / name).write_bytes(same)
    hub.publish(REPO, folder)
    hub.faults.bytes_per_second = 2_000_000
    model = pulled(f"{source}:{REPO}")
    assert all((model.path / name).read_bytes() == same for name in ("a.json", "b.json", "c.json"))


@both_hubs
def test_a_cut_connection_resumes(hub: HubServer, content: bytes, source: str) -> None:
    hub.faults.cut_after, hub.faults.cuts = 150_000, 2
    model = pulled(f"{source}:{REPO}")
    assert (model.path / "model.safetensors").read_bytes() == content
    first, *resumed = weight_ranges(hub)
    assert first is None and len(resumed) == 2 and all(resumed)
    assert (
        model.sha256
        == hashlib.sha256(f"{hashlib.sha256(content).hexdigest()}\n".encode()).hexdigest()
    )


@both_hubs
def test_a_server_that_ignores_range_restarts(hub: HubServer, content: bytes, source: str) -> None:
    hub.faults.cut_after, hub.faults.cuts, hub.faults.ignore_range = 150_000, 1, True
    model = pulled(f"{source}:{REPO}")
    assert (model.path / "model.safetensors").read_bytes() == content
    assert len(weight_ranges(hub)) == 2 and weight_ranges(hub)[1]


@both_hubs
def test_a_flipped_byte_is_fetched_again(hub: HubServer, content: bytes, source: str) -> None:
    hub.faults.flips = 1
    model = pulled(f"{source}:{REPO}")
    assert (model.path / "model.safetensors").read_bytes() == content
    assert weight_ranges(hub) == [None, None]


@both_hubs
def test_a_file_that_never_verifies_is_thrown_away(
    hub: HubServer, source: str, home: Path, tmp_path: Path
) -> None:
    folder = repository(tmp_path / "repository")
    (folder / "tokenizer.json").unlink()  # leaves the weights alone to be spoilt
    hub.publish(REPO, folder)
    hub.faults.flips = 99
    with pytest.raises(DownloadError, match=r"model\.safetensors .*wrong checksum"):
        pulled(f"{source}:{REPO}")
    assert not list(home.glob("models/[!.]*"))
    assert max(path.stat().st_size for path in home.rglob("*") if path.is_file()) < WEIGHTS


@both_hubs
def test_a_failing_server_is_a_failure_even_with_half_the_file(
    hub: HubServer, content: bytes, source: str, home: Path
) -> None:
    hub.faults.bytes_per_second = 400_000
    interrupt(f"{source}:{REPO}")
    half = partial_file(home)
    assert half is not None and 0 < half.stat().st_size < WEIGHTS
    hub.faults.file_status = 503
    with pytest.raises(DownloadError, match="HTTP 503"):
        pulled(f"{source}:{REPO}")
    with pytest.raises(ModelError, match="tunesmith pull"):
        locate(f"{source}:{REPO}")
    hub.faults.file_status = hub.faults.bytes_per_second = 0
    assert (pulled(f"{source}:{REPO}").path / "model.safetensors").read_bytes() == content
    assert weight_ranges(hub)[-1]  # the half was kept


@both_hubs
def test_a_failing_listing_is_one_sentence(hub: HubServer, content: bytes, source: str) -> None:
    hub.faults.listing_status = 500
    with pytest.raises(DownloadError, match=f"no usable answer about {REPO} .HTTP 500"):
        pulled(f"{source}:{REPO}")


@both_hubs
def test_two_processes_get_one_download(
    hub: HubServer, content: bytes, source: str, home: Path
) -> None:
    hub.faults.bytes_per_second = 300_000
    processes = [pull_process(f"{source}:{REPO}", hub, home) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert {output.splitlines()[-1] for output in outputs} == {
        repr(Ready(locate(f"{source}:{REPO}")))
    }
    assert weight_ranges(hub) == [None]
    assert sum("Another process" in output for output in outputs) == 1


@both_hubs
def test_killed_while_downloading_resumes(
    hub: HubServer, content: bytes, source: str, home: Path
) -> None:
    hub.faults.bytes_per_second = 200_000
    process = pull_process(f"{source}:{REPO}", hub, home)
    while (half := partial_file(home)) is None or half.stat().st_size < 100_000:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(home.glob("models/[!.]*"))
    size = half.stat().st_size
    hub.faults.bytes_per_second = 0
    assert (pulled(f"{source}:{REPO}").path / "model.safetensors").read_bytes() == content
    assert weight_ranges(hub) == [None, f"bytes={size}-"]


@pytest.mark.parametrize("prefix", ["", "hf:", "modelscope:"])
@pytest.mark.parametrize(
    "name", ["../../etc", "a/b/c", "a\0b/c", "a/" + "b" * 300, "/etc/x", "a/..", "-a/b", "", "a//b"]
)
def test_hostile_names_touch_nothing(hub: HubServer, home: Path, prefix: str, name: str) -> None:
    with pytest.raises((UsageError, ModelError)):
        pulled(prefix + name)
    assert not home.exists() and not hub.requests


@both_hubs
@pytest.mark.parametrize(
    "name", ["../evil.json", "/tmp/evil.json", "a/../../evil.json", "..\\evil.json", "a\0.json"]
)
def test_hostile_file_names_are_refused(
    hub: HubServer, content: bytes, home: Path, source: str, name: str
) -> None:
    hub.faults.extra_names = [name]
    with pytest.raises(DownloadError, match="would leave its folder"):
        pulled(f"{source}:{REPO}")
    assert not hub.file_requests()
    assert [path.name for path in (home / "models").iterdir()] == [".locks"]


@both_hubs
def test_upstream_may_move_the_model_stays(
    hub: HubServer, content: bytes, source: str, tmp_path: Path
) -> None:
    first = pulled(f"{source}:{REPO}")
    folder = repository(tmp_path / "repository", seed=1)
    second = hub.publish(REPO, folder)
    asked = len(hub.requests)
    assert pulled(f"{source}:{REPO}") == first
    assert len(hub.requests) == asked  # nothing was even looked up
    updated = pulled(f"{source}:{REPO}", update=True)
    assert updated.revision == second != first.revision
    assert (updated.path / "model.safetensors").read_bytes() != content
    tokenizers = [seen for seen in hub.file_requests() if "tokenizer.json" in seen.path]
    assert len(tokenizers) == 1  # unchanged, so taken from the older copy
    notice = Notice(f"{source}:{REPO} is at its newest revision already.")
    assert list(pull(f"{source}:{REPO}", update=True)) == [notice, Ready(updated)]


@both_hubs
def test_upstream_moves_during_the_download(
    hub: HubServer, content: bytes, source: str, tmp_path: Path
) -> None:
    first = hub.repos[REPO][-1].sha
    hub.faults.bytes_per_second = 400_000
    interrupt(f"{source}:{REPO}")
    hub.publish(REPO, repository(tmp_path / "repository", seed=1))
    hub.faults.bytes_per_second = 0
    model = pulled(f"{source}:{REPO}")
    assert model.revision == first
    assert (model.path / "model.safetensors").read_bytes() == content


def test_modelscope_may_serve_only_branches(hub: HubServer, content: bytes) -> None:
    hub.faults.branches_only = True
    model = pulled(f"modelscope:{REPO}")
    assert (model.path / "model.safetensors").read_bytes() == content
    assert model.revision == hub.repos[REPO][-1].sha


@both_hubs
def test_a_revision_asked_for_is_the_one_that_comes(
    hub: HubServer, content: bytes, source: str, tmp_path: Path
) -> None:
    first = hub.repos[REPO][-1].sha
    hub.publish(REPO, repository(tmp_path / "repository", seed=1))
    model = pulled(f"{source}:{REPO}@{first}")
    assert (model.path / "model.safetensors").read_bytes() == content
    with pytest.raises(DownloadError, match="nosuch"):
        pulled(f"{source}:{REPO}@nosuch")


@both_hubs
def test_offline(hub: HubServer, content: bytes, source: str) -> None:
    model = pulled(f"{source}:{REPO}")
    hub.close()
    assert pulled(f"{source}:{REPO}") == locate(f"{source}:{REPO}") == model
    with pytest.raises(DownloadError, match="cannot be reached") as caught:
        pulled(f"{source}:maker/other")
    assert "\n" not in str(caught.value) and "maker/other" in str(caught.value)


@both_hubs
def test_missing_repository_is_named(hub: HubServer, source: str) -> None:
    with pytest.raises(DownloadError, match="maker/nowhere"):
        pulled(f"{source}:maker/nowhere")


@both_hubs
def test_gated_repository_is_named_and_the_token_stays_secret(
    hub: HubServer,
    content: bytes,
    source: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    token = "hf_0123456789secret"
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", token)
    caplog.set_level(logging.DEBUG)
    hub.faults.gated = {REPO}
    with pytest.raises(DownloadError, match=REPO) as caught:
        pulled(f"{source}:{REPO}")
    hub.faults.gated = set()
    hub.faults.cuts, hub.faults.cut_after = 1, 100_000
    pulled(f"{source}:{REPO}")
    sent = [seen for seen in hub.requests if seen.authorization and token in seen.authorization]
    assert sent and not [seen for seen in sent if seen.host.startswith("localhost")]
    captured = capfd.readouterr()
    told = "".join(traceback.format_exception(caught.value))
    assert token not in told + caplog.text + captured.out + captured.err
