"""The head's loss a few rows at a time: the same function as from whole logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from tests.test_forward import some_samples, tuned
from tunesmith.data.packs import pack
from tunesmith.training.forward import pack_loss, prove_packing
from tunesmith.training.head import CHUNK_BYTES, Head, Targets

ROWS, WIDTH, VOCAB = 23, 8, 50


def some_targets(*, soft: bool) -> Targets:
    """Up to three for each row; where soft, something is left for other tokens in every other."""
    row = torch.arange(ROWS).repeat_interleave(torch.arange(ROWS) % 3 + 1)
    counts = torch.bincount(row)
    token = torch.cat([torch.randperm(VOCAB)[:count] for count in counts.tolist()])
    weight = torch.rand(len(row), dtype=torch.float64)
    rest = torch.rand(ROWS, dtype=torch.float64) * (torch.arange(ROWS) % 2) if soft else None
    return Targets(row, token, weight, rest, (0, *counts.cumsum(0).tolist()))


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 2.0), (0.5, 3.0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_loss_and_gradient_are_those_of_whole_logits(
    scale: float, cap: float | None, bias: bool, soft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * VOCAB * 5)  # five rows at a time
    torch.manual_seed(0)
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64)
    offset = torch.randn(VOCAB, dtype=torch.float64) if bias else None
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    head, targets = Head(weight, offset, scale, cap), some_targets(soft=soft)
    assert len(head.chunks(ROWS)) == 5

    logits = linear(hidden, weight, offset) * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    losses = -logits.log_softmax(-1)[targets.row, targets.token]
    expected = (losses * targets.weight).sum()
    if targets.rest is not None:
        others = torch.ones_like(logits).index_put(targets.place, torch.tensor(0.0).double())
        expected = expected - (targets.rest * (logits.softmax(-1) * others).sum(-1).log()).sum()
    (gradient,) = torch.autograd.grad(expected * 3, hidden)

    found = head.loss(hidden, targets)
    (ours,) = torch.autograd.grad(found * 3, hidden)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert torch.allclose(ours, gradient, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert float(head.loss(hidden, targets)) == pytest.approx(
            float(expected.detach()), rel=1e-12
        )


def test_a_head_that_does_more_is_left_to_the_model(tmp_path: Path) -> None:
    model: Any = tuned(tmp_path, "llama").get_base_model()
    samples = some_samples(2)
    head = prove_packing(model, samples)
    assert head is not None
    packed = pack(samples)
    with torch.no_grad():
        whole = float(pack_loss(model, packed))
        by_rows = float(pack_loss(model, packed, head))
    assert by_rows == pytest.approx(whole, rel=1e-10)
    model.config.logit_scale = 3.0  # says that it scales, and does not
    assert prove_packing(model, samples) is None
    model.get_output_embeddings().weight.requires_grad_(True)
    del model.config.logit_scale
    assert Head.of(model) is None
