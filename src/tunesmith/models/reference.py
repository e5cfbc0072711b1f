"""What a MODEL argument names: a hub repository, one revision, perhaps one file of it."""

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from tunesmith.errors import UsageError
from tunesmith.language import t

Source = Literal["modelscope", "hf", "pypi", "local"]

SOURCE_NAMES: dict[Source, str] = {
    "modelscope": "ModelScope",
    "hf": "Hugging Face",
    "pypi": "PyPI",
    "local": "local",
}

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(rf"{_PART}/{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,99}")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,150}\.gguf")


@dataclass(frozen=True)
class Reference:
    """`hf:owner/name@revision#file.gguf`. `revision` None is the repository's default branch."""

    source: Source
    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.source}:{self.repo}{revision}" + (f"#{self.file}" if self.file else "")

    @property
    def folder(self) -> str:
        """One path component, never the same for two references; `+` occurs in no valid part."""
        name = re.sub(r"[:/]", "+", str(self))
        if len(name) <= 180:
            return name
        return f"{name[:160]}+{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def is_reference(spec: str) -> bool:
    """Whether `spec` names a hub repository, well or badly."""
    return spec.startswith(("hf:", "modelscope:"))


def parse(spec: str) -> Reference:
    """Read `hf:owner/name[@revision][#file.gguf]` or the same with `modelscope:`.

    Raises:
        UsageError: The name cannot be a repository of a hub; nothing was looked up or touched.
    """
    source, _, rest = spec.partition(":")
    rest, has_file, file = rest.partition("#")
    repo, has_revision, revision = rest.partition("@")
    valid = (
        source in ("hf", "modelscope")
        and _REPO.fullmatch(repo)
        and (not has_revision or _REVISION.fullmatch(revision))
        and (not has_file or _FILE.fullmatch(file))
        and not any(bad in rest for bad in ("..", "//"))
    )
    if not valid:
        raise UsageError(
            t(
                "{spec} is not a model on a hub; write hf:owner/name or modelscope:owner/name, "
                "with @revision for one version and #file.gguf for one file.",
                spec=shown(spec),
            )
        )
    return Reference("hf" if source == "hf" else "modelscope", repo, revision or None, file or None)


def shown(text: str) -> str:
    """What a user typed, safe to print: control characters escaped, cut to one line."""
    quoted = repr(text)
    return quoted if len(quoted) <= 80 else f"{quoted[:79]}…"
