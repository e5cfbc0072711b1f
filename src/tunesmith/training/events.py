"""What `train()` yields. Terminal, page, trackers and tests consume the same events."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Replaying:
    """The base model is answering neutral questions, `done` of `total` so far."""

    done: int
    total: int


@dataclass(frozen=True)
class Planned:
    """What is about to happen, before any weight moves.

    `samples` counts those trained on, `replay` of them are neutral questions; `cut` lost the end
    of an answer to the length limit, `dropped` had nothing left to train on. A step is cut into
    passes of at most `micro_batch_tokens`, and `recomputed_layers` of the `layers` that could
    recompute their activations do; of `recomputed_mlps` others, the MLPs do.
    """

    samples: int
    replay: int
    held_out: int
    tokens: int
    trained_tokens: int
    cut: int
    dropped: int
    steps: int
    learning_rate: float
    trainable_parameters: int
    total_parameters: int
    device: str
    dtype: str
    micro_batch_tokens: int
    recomputed_layers: int
    recomputed_mlps: int
    layers: int


@dataclass(frozen=True)
class Started:
    """The first step is next; `resumed_from` is the checkpoint's step, 0 for a fresh run.

    `environment` names what it is made with: versions, processor, GPU.
    """

    resumed_from: int
    notices: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One optimizer step. `loss` is nats per trained token; `memory` the process's peak bytes."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    unique_tokens: int
    seconds: float
    memory: int


@dataclass(frozen=True)
class Evaluated:
    """A look at the model so far.

    `loss` is that of the held-out rows, in nats per trained token. `kl` and `agreement` tell how
    far the model has moved from its base at neutral answers (see `Drift`); None where no neutral
    question is asked. `best` says whether it is better than at any earlier look (see `Progress`).
    """

    step: int
    loss: float
    best: bool
    kl: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Saved:
    """A checkpoint that verified."""

    step: int
    path: Path


@dataclass(frozen=True)
class Shrunk:
    """Memory ran out: the step is done again in smaller passes or with layers that recompute.

    The effective batch is the same.
    """

    step: int
    micro_batch_tokens: int
    recomputed_layers: int


@dataclass(frozen=True)
class Finished:
    """The adapter of the best checkpoint lies at `adapter`, and `loss` is its held-out loss.

    `fit`: nats a token by which held-out answers are likelier after their own questions than after
    others', at the last step.
    """

    step: int
    adapter: Path
    loss: float | None
    stopped_early: bool
    fit: float | None = None


@dataclass(frozen=True)
class Failed:
    """Training ended without finishing; `checkpoint` is where it can go on from."""

    reason: str
    checkpoint: Path | None


Event = Replaying | Planned | Started | Step | Evaluated | Saved | Shrunk | Finished | Failed
