"""The forward pass over a pack: one row of unique tokens, attention by segments, loss at targets.

transformers owns the model; we plug in at two documented seams: a named attention function, and
`logits_to_keep`, which runs the head only where something is to be said.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.data.packs import Pack, Sample, Segment, pack
from tunesmith.errors import TrainingError
from tunesmith.language import t
from tunesmith.training.attention import TileAttention, scratch_size
from tunesmith.training.head import Head, Targets
from tunesmith.training.kernels.attention import Lengths, segments_attention
from tunesmith.training.tiles import Tile, Tiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "tunesmith_packed"
HALF = (torch.bfloat16, torch.float16)
ROUND = 256  # tokens


class PackAttention:
    """The segments of a pack, and what its layers share; on a GPU their lengths."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.segments = segments
        self.lengths = _lengths(segments, device) if device.type == "cuda" else None
        self._device = device
        self._masks: dict[tuple[Tile, int | None], Tensor] = {}
        self._scratch = torch.empty(0)

    @cached_property
    def tiles(self) -> Tiles:
        """The segments by size."""
        return Tiles(self.segments, self._device)

    def mask(self, tile: Tile, window: int | None, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of a tile (see `Tile.mask`). A pack asks for one `dtype`."""
        if (tile, window) not in self._masks:
            self._masks[tile, window] = tile.mask(window, dtype, self._device)
        return self._masks[tile, window]

    def scratch(self, size: int) -> Tensor:
        """Memory on the CPU to work in, so many float32 or more; the same for all layers."""
        if len(self._scratch) < size:
            self._scratch = torch.empty(size)
        return self._scratch


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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    lengths, plain = pack_attention.lengths, softcap is None and not dropout
    if lengths is not None and query.dtype in HALF and plain:
        return segments_attention(query, key, value, lengths, scale, sliding_window), None
    by_products = plain and query.device.type == "cpu" and query.dtype == torch.bfloat16
    groups = 1 if by_products else query.shape[1] // key.shape[1]
    outputs = []
    for tile, q, own_k, own_v in pack_attention.tiles.split(query, key, value):
        k, v = (part.repeat_interleave(groups, 1) for part in (own_k, own_v))
        window = sliding_window if sliding_window and sliding_window < tile.keys else None
        if by_products:
            mask = pack_attention.mask(tile, window, torch.float32)
            scratch = pack_attention.scratch(scratch_size(q, k))
            output: Tensor = TileAttention.apply(q, k, v, mask, scale, scratch)  # type: ignore[no-untyped-call]
        elif softcap is not None:
            mask = pack_attention.mask(tile, window, q.dtype)
            output = _capped_attention(q, k, v, mask, scale, softcap)
        elif tile.is_causal and window is None:
            output = F.scaled_dot_product_attention(
                q, k, v, None, dropout, is_causal=True, scale=scale
            )
        else:
            mask = pack_attention.mask(tile, window, q.dtype)
            output = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        outputs.append(output)
    return pack_attention.tiles.join(outputs), None


def pack_loss(model: "PreTrainedModel", packed: Pack, head: Head | None = None) -> Tensor:
    """Sum over the targets of weight × negative log likelihood, in nats; a scalar.

    Divide by the weight of the whole step, not of the pack, so that pieces add up. With the
    model's `head` its logits are never kept.
    """
    said, targets = _targets(packed, model)
    if head is not None:
        return head.loss(_states(model, packed, said, head), targets)
    losses = pack_losses(model, packed)
    # Not a dot product: autocast would round it to bf16.
    loss = (losses * targets.weight).sum()
    if targets.rest is None:
        return loss
    return loss - (targets.rest * targets.left((-losses).exp()).log()).sum()


def pack_losses(model: "PreTrainedModel", packed: Pack) -> Tensor:
    """Negative log likelihood of each target, in nats, by its place in the pack; shape (T,)."""
    said, targets = _targets(packed, model)
    logits = _states(model, packed, said, None)
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return -logits.log_softmax(-1, dtype=exact)[targets.row, targets.token]


def said_states(model: "PreTrainedModel", packed: Pack, head: Head | None) -> Tensor:
    """What the head reads where something is to be said, (rows, D); without it, what it says.

    Without `head`, logits: (rows, vocab_size).
    """
    said, _ = _targets(packed, model)
    return _states(model, packed, said, head)


def _states(model: "PreTrainedModel", packed: Pack, said: Tensor, head: Head | None) -> Tensor:
    inputs = _inputs(packed, model.device)
    if head is not None:
        hidden: Tensor = _body(model)(**inputs).last_hidden_state[0]  # (U, D)
        return hidden[said]
    call: Any = model
    logits: Tensor = call(**inputs, logits_to_keep=said).logits[0]
    return logits


def _inputs(packed: Pack, device: torch.device) -> dict[str, Any]:
    return {
        "input_ids": torch.tensor([packed.tokens], device=device),  # (1, U)
        "position_ids": torch.tensor([packed.positions], device=device),  # (1, U)
        "pack_attention": PackAttention(packed.segments, device),
        "use_cache": False,
    }


def _targets(packed: Pack, model: "PreTrainedModel") -> tuple[Tensor, Targets]:
    """The tokens after which something is said, as indices, and what."""
    device, exact = model.device, torch.float64 if model.dtype == torch.float64 else torch.float32
    index, token, weight = zip(*sorted(packed.targets), strict=True)
    places: Any = torch.tensor(index)
    said, counts = places.unique(return_counts=True)  # sorted
    row = torch.arange(len(said)).repeat_interleave(counts)
    rest = dict(packed.rest)
    return said.to(device), Targets(
        row.to(device),
        torch.tensor(token, device=device),
        torch.tensor(weight, device=device, dtype=exact),
        torch.tensor([rest.get(place, 0.0) for place in said.tolist()], device=device, dtype=exact)
        if rest
        else None,
        (0, *counts.cumsum(0).tolist()),
    )


def _body(model: "PreTrainedModel") -> Any:
    """The model without its head, and without the wrapping of PEFT, whose layers stay."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    return getattr(base, base.base_model_prefix)


def prove_packing(model: "PreTrainedModel", samples: Sequence[Sample]) -> Head | None:
    """Compare a small pack with the model's own forward pass, sample by sample.

    A model that carries more from token to token than keys and values is not asked: a short
    convolution (LFM2) errs in the first tokens of a segment alone, which is too few to see.

    Returns the model's head, if the loss may be taken from it a few rows at a time; None if what
    the model does behind its last layer is more than that.

    Raises:
        TrainingError: This model mixes tokens in a way packs do not know.
    """
    if carries_state(model):
        raise TrainingError(
            t("{model} cannot be trained in packs: some of its layers carry a state from token to "
              "token; choose a model with plain causal attention.", model=type(model).__name__)
        )  # fmt: skip
    probe = [_shorten(sample) for sample in samples[:2]]
    packed = pack(probe, share=False)
    head = Head.of(model)
    with torch.no_grad():
        losses = pack_losses(model, packed).double()
        alone = torch.cat([_plain_losses(model, sample) for sample in probe])
        by_head = None if head is None else float(pack_loss(model, packed, head))
    # bf16 keeps 8 bits, so single tokens differ a little; a leak between samples moves them all.
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    difference = float((losses - alone).abs().mean())
    if not difference <= tolerance:
        raise TrainingError(
            t(
                "{model} cannot be trained in packs: its losses there differ by {difference:.2g} "
                "nats from those alone; choose a model with plain causal attention.",
                model=type(model).__name__,
                difference=difference,
            )
        )
    if by_head is None or abs(by_head / len(alone) - float(alone.mean())) > tolerance:
        return None
    return head


def carries_state(model: "PreTrainedModel") -> bool:
    """Whether a layer keeps more of what it has read than keys and values."""
    from transformers import DynamicCache
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    layers = DynamicCache(config=model.config).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def arithmetic(model: "PreTrainedModel") -> AbstractContextManager[Any]:
    """bf16 matrix products over float32 LoRA weights where the base is bf16."""
    if model.dtype != torch.bfloat16:
        return nullcontext()
    return torch.autocast(model.device.type, torch.bfloat16)


def by_lengths(model: "PreTrainedModel") -> bool:
    """Whether one kernel reads all segments of a pack: a GPU's, in 16 bits, for plain scores."""
    config: Any = model.config
    plain = getattr(config, "attn_logit_softcapping", None) is None
    dropout = getattr(config, "attention_dropout", 0.0)
    return model.device.type == "cuda" and model.dtype in HALF and plain and not dropout


def register_attention() -> None:
    """Make `attn_implementation=ATTENTION` known to transformers; doing it twice is harmless."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)


def _lengths(segments: Sequence[Segment], device: torch.device) -> Lengths:
    own = [segment.stop - segment.start for segment in segments]
    seen = [sum(own[node] for node in segment.path) for segment in segments]
    alike = own == seen and len(set(own)) == 1 and own[0] % ROUND == 0
    starts = _starts(own, device)
    gather = starts.long()
    if own != seen:
        runs = [segments[node] for one in segments for node in one.path]
        ranges = [torch.arange(run.start, run.stop) for run in runs]
        gather = torch.cat(ranges).to(device, non_blocking=True)
    sizes = torch.tensor([max(own), max(seen), alike, own != seen])
    return Lengths(starts, _starts(seen, device), gather, sizes)


def _starts(sizes: Sequence[int], device: torch.device) -> Tensor:
    sums = torch.tensor([0, *sizes]).cumsum(0)
    return sums.to(device, torch.int32, non_blocking=True)


def _capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float
) -> Tensor:
    """Attention with tanh-capped scores (Gemma 2), which SDPA does not offer."""
    scores = q @ k.transpose(2, 3) * scale
    scores = softcap * torch.tanh(scores / softcap) + mask
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights = scores.softmax(-1, dtype=exact)
    return weights.to(q.dtype) @ v


def _plain_losses(model: "PreTrainedModel", sample: Sample) -> Tensor:
    ids = torch.tensor([sample.input_ids], device=model.device)
    model.set_attn_implementation("eager")
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
    model.set_attn_implementation(ATTENTION)
    return F.cross_entropy(logits, ids[0, 1:], reduction="none")


def _shorten(sample: Sample, length: int = 64) -> Sample:
    """The sample's head, every token a target, so that the probe is cheap and sees them all."""
    ids = sample.input_ids[:length]
    return Sample(ids, (True,) * len(ids))
