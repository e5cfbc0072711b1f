"""The forward pass over a pack: one row of unique tokens, attention by segments, loss at targets.

transformers owns the model; we plug in at two documented seams: a named attention function, and
`logits_to_keep`, which runs the head only where something is to be said.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.data.packs import Pack, Sample, Segment, pack
from tunesmith.errors import TrainingError
from tunesmith.language import t

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "tunesmith_packed"


class PackAttention:
    """The segments of a pack, and the masks its layers share."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """Which keys each query sees, aligned at the bottom right: bool (queries, keys)."""
        shape = (queries, keys, window)
        if shape not in self._masks:
            distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(
                keys, device=device
            )
            seen = distance >= 0
            self._masks[shape] = seen if window is None else seen & (distance < window)
        return self._masks[shape]


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, H, U, d)
    key: Tensor,  # (1, H_kv, U, d)
    value: Tensor,  # (1, H_kv, U, d)
    attention_mask: None,
    *,
    pack_attention: PackAttention,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of each segment over the keys on its path; returns (1, U, H, d).

    The signature is that of transformers' attention functions, `pack_attention` besides.
    """
    groups = query.shape[1] // key.shape[1]
    lengths = [segment.stop - segment.start for segment in pack_attention.segments]
    # Split once: a slice for each segment would fill a whole gradient with zeros each.
    all_q, all_k, all_v = (torch.split(whole, lengths, 2) for whole in (query, key, value))
    outputs = []
    for segment, q in zip(pack_attention.segments, all_q, strict=True):
        k, v = (_along(segment.path, parts, groups) for parts in (all_k, all_v))
        queries, keys = q.shape[2], k.shape[2]
        window = sliding_window if sliding_window and sliding_window < keys else None
        plain = queries == keys and window is None
        if softcap is not None:
            mask = pack_attention.mask(queries, keys, window, q.device)
            outputs.append(_capped_attention(q, k, v, mask, scaling, softcap))
        else:
            mask_or_none = None if plain else pack_attention.mask(queries, keys, window, q.device)
            outputs.append(
                F.scaled_dot_product_attention(
                    q, k, v, mask_or_none, dropout, is_causal=plain, scale=scaling
                )
            )
    return torch.cat(outputs, 2).transpose(1, 2), None


def pack_loss(model: "PreTrainedModel", packed: Pack) -> Tensor:
    """Sum over the targets of weight × negative log likelihood, in nats; a scalar.

    Divide by the weight of the whole step, not of the pack, so that pieces add up.
    """
    losses = pack_losses(model, packed)
    weights = [weight for _, _, weight in packed.targets]
    # Not a dot product: autocast would round it to bf16.
    return (losses * torch.tensor(weights, device=losses.device, dtype=losses.dtype)).sum()


def pack_losses(model: "PreTrainedModel", packed: Pack) -> Tensor:
    """Negative log likelihood of each target, in nats and their order; shape (T,)."""
    log_probabilities = said_log_probabilities(model, packed)
    rows = {index: row for row, index in enumerate(_said_at(packed))}
    row = torch.tensor([rows[index] for index, _, _ in packed.targets], device=model.device)
    target = torch.tensor([target for _, target, _ in packed.targets], device=model.device)
    return -log_probabilities[row, target]


def said_log_probabilities(model: "PreTrainedModel", packed: Pack) -> Tensor:
    """Log probabilities of the next token wherever something is said; shape (rows, vocab_size).

    A row for each token that has targets, in the order of the tokens.
    """
    device = model.device
    logits: Tensor = model(
        input_ids=torch.tensor([packed.tokens], device=device),  # (1, U)
        position_ids=torch.tensor([packed.positions], device=device),  # (1, U)
        logits_to_keep=torch.tensor(_said_at(packed), device=device),
        pack_attention=PackAttention(packed.segments),
        use_cache=False,
    ).logits[0]
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.log_softmax(-1, dtype=exact)


def prove_packing(model: "PreTrainedModel", samples: Sequence[Sample]) -> None:
    """Compare a small pack with the model's own forward pass, sample by sample.

    Raises:
        TrainingError: They differ: this model mixes tokens in a way packs do not know.
    """
    probe = [_shorten(sample) for sample in samples[:2]]
    with torch.no_grad():
        packed = pack_losses(model, pack(probe, share=False)).double()
        model.set_attn_implementation("eager")
        alone = torch.cat([_plain_losses(model, sample) for sample in probe])
        model.set_attn_implementation(ATTENTION)
    # bf16 keeps 8 bits, so single tokens differ a little; a leak between samples moves them all.
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    difference = float((packed - alone).abs().mean())
    if not difference <= tolerance:
        raise TrainingError(
            t(
                "{model} cannot be trained in packs: its losses there differ by {difference:.2g} "
                "nats from those alone; choose a model with plain causal attention.",
                model=type(model).__name__,
                difference=difference,
            )
        )


def arithmetic(model: "PreTrainedModel") -> AbstractContextManager[Any]:
    """bf16 matrix products over float32 LoRA weights where the base is bf16."""
    if model.dtype != torch.bfloat16:
        return nullcontext()
    return torch.autocast(model.device.type, torch.bfloat16)


def register_attention() -> None:
    """Make `attn_implementation=ATTENTION` known to transformers; doing it twice is harmless."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)


def _said_at(packed: Pack) -> list[int]:
    return sorted({index for index, _, _ in packed.targets})


def _along(path: Sequence[int], parts: Sequence[Tensor], groups: int) -> Tensor:
    """The keys or values on a path, each repeated for its group of query heads."""
    joined = parts[path[0]] if len(path) == 1 else torch.cat([parts[node] for node in path], 2)
    return joined.repeat_interleave(groups, 1)


def _capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, softcap: float
) -> Tensor:
    """Attention with tanh-capped scores (Gemma 2), which SDPA does not offer."""
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=exact)
    return weights.to(q.dtype) @ v


def _plain_losses(model: "PreTrainedModel", sample: Sample) -> Tensor:
    ids = torch.tensor([sample.input_ids], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
    return F.cross_entropy(logits, ids[0, 1:], reduction="none")


def _shorten(sample: Sample, length: int = 64) -> Sample:
    """The sample's head, every token a target, so that the probe is cheap and sees them all."""
    ids = sample.input_ids[:length]
    return Sample(ids, (True,) * len(ids))
