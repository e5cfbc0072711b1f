"""Checkpoints: everything the next step needs, written whole or not at all.

A checkpoint holds the adapter as PEFT saves it, the optimizer's moments, and a few numbers. The
order of samples and the random numbers of a step follow from the seed and the step, so nothing
else is needed to go on exactly.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith import paths
from tunesmith.errors import RunError
from tunesmith.language import t
from tunesmith.models.adapter import AdapterInfo, save_adapter
from tunesmith.runs import Run, read_json
from tunesmith.training.lora import trainable

if TYPE_CHECKING:
    from peft import PeftModel

KEPT = 2  # newest checkpoints kept besides the best one
NEARLY = 0.1  # of what the held-out loss has fallen, or of a KL: as good as the lowest
AS_LOW = 0.05  # nats a token above the lowest held-out loss, at most: as good
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Progress:
    """How far training is, and how its steps are cut.

    The best step is the one that has learnt and kept: of those whose held-out loss is nearly the
    lowest, the last that is nearly as near to the base as any, since the steps at the end are the
    smallest and settle most. `best_loss` is seen there, `best_kl` is the lowest of those. `stale`
    counts evaluations since the lowest loss. A pass has at most `micro_batch_tokens`, and the
    first `recomputed_layers` compute their activations again in backward; of the next
    `recomputed_mlps` layers, the MLPs do.
    """

    step: int = 0
    best_step: int = 0
    best_loss: float | None = None
    best_kl: float | None = None
    first_loss: float | None = None
    lowest_loss: float | None = None
    stale: int = 0
    micro_batch_tokens: int = 0
    recomputed_layers: int = 0
    recomputed_mlps: int = 0

    def having_seen(self, loss: float, kl: float | None) -> "Progress":
        """With what an evaluation at this step saw taken in; at step 0 there is nothing to keep."""
        if self.step == 0:
            return replace(self, first_loss=loss)
        lowest = loss if self.lowest_loss is None else min(loss, self.lowest_loss)
        stale = 0 if lowest != self.lowest_loss else self.stale + 1
        seen = replace(self, lowest_loss=lowest, stale=stale)
        fallen = lowest if self.first_loss is None else max(0.0, self.first_loss - lowest)
        good = lowest + min(NEARLY * fallen, AS_LOW)
        if self.best_loss is not None and self.best_loss <= good:
            if kl is None or self.best_kl is None:
                better = loss < self.best_loss
            else:
                better = loss <= good and kl <= self.best_kl * (1 + NEARLY)
                kl = min(kl, self.best_kl)
            if not better:
                return seen
        return replace(seen, best_step=self.step, best_loss=loss, best_kl=kl)

    def cut_as(self, other: "Progress") -> "Progress":
        """As far as this, its steps cut like the other's."""
        return replace(
            self,
            micro_batch_tokens=other.micro_batch_tokens,
            recomputed_layers=other.recomputed_layers,
            recomputed_mlps=other.recomputed_mlps,
        )


def save_checkpoint(
    run: Run,
    model: "PeftModel",
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    info: AdapterInfo,
) -> Path:
    """Write `checkpoints/step-NNNNNN`; older ones that are no longer needed are removed.

    Raises:
        RunError: The disk is full or not writable; earlier checkpoints stay.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = _folder(run, progress.step)
    try:
        with paths.new_folder(path) as folder:
            save_adapter(model, folder / "adapter", info)
            save_file(_moments(model, optimizer), folder / "optimizer.safetensors")
            (folder / "progress.json").write_text(json.dumps(asdict(progress)), "utf-8")
            _write_manifest(folder)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's error
        raise RunError(
            t("{path} could not be saved ({error}); earlier checkpoints are whole. Free some "
              "space, then train again with --resume.", path=path, error=error)
        ) from None  # fmt: skip
    _remove_old(run, progress)
    return path


def newest_checkpoint(run: Run) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a notice for each newer one that does not."""
    for leftover in run.checkpoints.glob(".*"):  # a save that was killed
        shutil.rmtree(leftover)
    notices: list[str] = []
    for path in sorted(run.checkpoints.glob("step-*"), reverse=True):
        if (broken := _what_is_broken(path)) is None:
            return path, notices
        notices.append(
            t("Checkpoint {name} does not verify ({what}); going back to the one before.",
              name=path.name, what=broken)
        )  # fmt: skip
    return None, notices


def load_checkpoint(path: Path, model: "PeftModel", optimizer: torch.optim.Optimizer) -> Progress:
    """Put a checkpoint's adapter and moments into the model and the optimizer."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = load_file(path / "adapter" / "adapter_model.safetensors")
    set_peft_model_state_dict(model, weights)
    moments = load_file(path / "optimizer.safetensors")
    for name, parameter in trainable(model).items():
        optimizer.state[parameter] = {
            key: moments[f"{name}:{key}"].to(parameter.device, copy=True)
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
    return Progress(**read_json(path / "progress.json"))


def best_adapter(run: Run, progress: Progress) -> Path:
    """The adapter folder of the best checkpoint, or of the last where nothing was evaluated."""
    step = progress.best_step if progress.best_loss is not None else progress.step
    return _folder(run, step) / "adapter"


def _folder(run: Run, step: int) -> Path:
    return run.checkpoints / f"step-{step:06d}"


def _moments(model: "PeftModel", optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}:{key}": value.contiguous()
        for name, parameter in trainable(model).items()
        for key, value in optimizer.state[parameter].items()
    }


def _write_manifest(folder: Path) -> None:
    hashes = {str(file.relative_to(folder)): _sha256(file) for file in _files(folder)}
    (folder / MANIFEST).write_text(json.dumps(hashes, indent=2), "utf-8")


def _what_is_broken(path: Path) -> str | None:
    try:
        hashes = read_json(path / MANIFEST)
    except RunError as error:
        return str(error)
    for name, expected in hashes.items():
        file = path / name
        if not file.is_file() or _sha256(file) != expected:
            return name
    return None


def _remove_old(run: Run, progress: Progress) -> None:
    newest = sorted(run.checkpoints.glob("step-*"), reverse=True)
    needed = {*newest[:KEPT], _folder(run, progress.best_step)}
    for path in newest:
        if path not in needed:
            shutil.rmtree(path)


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file())


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
