"""The fused LoRA product in bf16: what LoRA adds is not lost beside the base's large output."""

import torch
from torch.nn.functional import linear

from tunesmith.training.fused import LoraProduct

ROWS, WIDTH, RANK = 512, 256, 8


def share_kept(found: torch.Tensor, without: torch.Tensor, added: torch.Tensor) -> float:
    """How much of what should have been added was: 1 is all, on average over the entries."""
    seen = found.detach().double() - without
    return float((seen * added).sum() / (added * added).sum())


def test_a_part_below_the_last_bit_still_arrives_both_ways() -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS, WIDTH).bfloat16().requires_grad_()
    weight = torch.randn(WIDTH, WIDTH).bfloat16()
    a, b = torch.randn(RANK, WIDTH).bfloat16() / 16, torch.randn(WIDTH, RANK).bfloat16() / 500
    output = LoraProduct.apply(x, weight, None, a, b, 1.0)  # type: ignore[no-untyped-call]
    above = torch.randn(ROWS, WIDTH).bfloat16()
    (gradient,) = torch.autograd.grad(output, x, above)

    x, weight, a, b, above = (one.detach().double() for one in (x, weight, a, b, above))
    added = x @ a.T @ b.T
    assert added.abs().mean() < 0.1 * 2**-8 * linear(x, weight).abs().mean()
    assert 0.7 < share_kept(output, linear(x, weight), added) < 1.3
    assert 0.7 < share_kept(gradient, above @ weight, above @ b @ a) < 1.3
