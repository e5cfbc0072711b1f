"""Attention as matrix products, in bf16: as near to the exact results as PyTorch's own."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tunesmith.data.packs import Segment
from tunesmith.training import attention
from tunesmith.training.attention import TileAttention, scratch_size
from tunesmith.training.forward import PackAttention, packed_attention

SCALE = 0.25
BF16 = 2**-7  # two roundings of one result


def drawn(heads: int, length: int, many: int = 1) -> Tensor:
    return torch.randn(many, heads, length, 16, dtype=torch.bfloat16)


def causal(queries: int, keys: int, window: int | None) -> Tensor:
    """True where a query sees a key, (queries, keys); the last query sees the last key."""
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    return (distance >= 0) & (distance < (window or keys))


def outcome(inputs: list[Tensor], seen: Tensor, outer: Tensor, *, ours: bool) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    q, k, v = (part.clone().requires_grad_() for part in inputs)
    if ours:
        mask = torch.zeros(len(q), 1, *seen.shape).masked_fill_(~seen, float("-inf"))
        scratch = torch.empty(scratch_size(q, k))
        output: Tensor = TileAttention.apply(q, k, v, mask, SCALE, scratch)  # type: ignore[no-untyped-call]
    else:
        output = scaled_dot_product_attention(q, k, v, seen, scale=SCALE, enable_gqa=True)
    torch.autograd.backward(output, outer.to(output.dtype))
    return [output, *(part.grad for part in (q, k, v) if part.grad is not None)]


@pytest.mark.parametrize("kept", [0, 2**18])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (12, 30), (40, 40), (40, 67), (1, 90)])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2), (3, 1)])
def test_it_errs_no_more_than_pytorchs_own(
    heads: int, shared: int, queries: int, keys: int, window: int | None, kept: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(attention, "BLOCK", 16)
    monkeypatch.setattr(attention, "KEPT", kept)
    torch.manual_seed(0)
    many = 3 if queries <= attention.BLOCK else 1
    inputs = [drawn(heads, queries, many), drawn(shared, keys, many), drawn(shared, keys, many)]
    outer, seen = drawn(heads, queries, many), causal(queries, keys, window)
    exact = outcome([part.double() for part in inputs], seen, outer, ours=False)
    ours = outcome(inputs, seen, outer, ours=True)
    theirs = outcome(inputs, seen, outer, ours=False)
    for found, their, right in zip(ours, theirs, exact, strict=True):
        assert found.dtype == torch.bfloat16 and found.shape == right.shape
        size = right.norm() + 1e-3  # a lone key's q and k get no gradient
        error, allowed = (found - right).norm() / size, (their - right).norm() / size
        assert error <= max(1.1 * allowed, BF16)


def test_scores_are_kept_for_backward_only_where_they_are_few() -> None:
    def kept(length: int) -> int:
        q, k, v = (drawn(2, length).requires_grad_() for _ in "qkv")
        saved: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scratch = torch.empty(scratch_size(q, k))
            TileAttention.apply(q, k, v, torch.zeros(1, 1, length, length), SCALE, scratch)  # type: ignore[no-untyped-call]
        return len(saved)

    assert (kept(64), kept(513)) == (5, 4)


def test_a_pack_in_bf16_on_a_cpu_goes_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two continuations of one prefix, beside PyTorch's attention of the same segments."""
    segments = [Segment(0, 9, (0,)), Segment(9, 14, (0, 1)), Segment(14, 30, (0, 2))]
    q, k, v = drawn(4, 30), drawn(2, 30), drawn(2, 30)

    def packed() -> Tensor:
        pack_attention = PackAttention(segments, torch.device("cpu"))
        return packed_attention(None, q, k, v, None, pack_attention=pack_attention)[0]  # type: ignore[arg-type]

    ours = packed()
    monkeypatch.setattr(TileAttention, "apply", None)
    with pytest.raises(TypeError):
        packed()
    q, k, v = q.double(), k.double(), v.double()
    assert (ours - packed()).norm() / ours.norm() < 5e-3
