"""A frozen linear layer in fp8 (e4m3), both directions on fp8 tensor cores.

Each row of the weight has its scale, and so has each row of what it is multiplied with; Hopper or
newer. Only one set of values is kept: for the way back the weight is turned, not rounded again.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

HIGHEST = 448.0  # of e4m3


class Float8Linear(nn.Linear):
    """Takes the place of an `nn.Linear` that is not trained; the weight keeps the shape (out, in).

    `row_scale` is what each row of the weight is multiplied with, (out,) float32.
    """

    row_scale: Tensor

    def __init__(self, values: Tensor, row_scale: Tensor, bias: Any) -> None:
        out_features, in_features = values.shape
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.weight = nn.Parameter(values, requires_grad=False)
        self.bias = bias
        self.register_buffer("row_scale", row_scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, out) in bf16."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        y = product(rows, self.weight, self.row_scale)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], -1)


def product(rows: Tensor, weight: Tensor, row_scale: Tensor) -> Tensor:
    """rows · weightᵀ in bf16; rows (M, in) bf16, weight (out, in) fp8, row_scale (out,)."""
    values, scale = quantise_rows(rows)
    return torch._scaled_mm(
        values, weight.T, scale, row_scale[None], out_dtype=torch.bfloat16, use_fast_accum=True
    )


def product_back(of_y: Tensor, turned: Tensor, row_scale: Tensor) -> Tensor:
    """of_y · weight in bf16; of_y (M, out) bf16, turned (in, out) fp8, row_scale (out,)."""
    values, scale = quantise_rows(of_y, row_scale)
    ones = _ones(len(turned), of_y.device)
    return torch._scaled_mm(
        values, turned.T, scale, ones, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def add_low_rank_(y: Tensor, inner: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """y += inner bᵀ + bias in place; y (M, N) bf16, inner (M, r), b (N, r) however it lies.

    Rounded up or down by chance, in proportion. Rounded to the nearest, what LoRA has learnt in its
    first steps would be lost: less than half the last bit of y. The chance is that of the place.
    """
    rows, width = y.shape
    rank = b.shape[1]
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))
    _add_low_rank[grid](
        y, inner, b, y if bias is None else bias, rows, width, rank, *b.stride(),
        BIASED=bias is not None, RANK=triton.next_power_of_2(max(16, rank)),
        ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return y


def quantise_rows(x: Tensor, column_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x · column_scale as e4m3 values (M, N) times a scale for each row, (M, 1) float32."""
    rows, width = x.shape
    values = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    columns = x if column_scale is None else column_scale
    size = triton.next_power_of_2(width)
    _quantise[(rows,)](
        x, columns, values, scale, HIGHEST, WIDTH=width, COLUMNS=size,
        SCALED=column_scale is not None, num_warps=min(32, max(4, size // 2048)),
    )  # fmt: skip
    return values, scale


ROWS, COLUMNS = 32, 128


@cache
def _ones(width: int, device: torch.device) -> Tensor:
    return torch.ones(1, width, device=device)


@triton.jit
def _quantise(x, column_scale, values, scale, highest,
              WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SCALED: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    found = tl.load(x + row * WIDTH + columns, inside, 0.0).to(tl.float32)
    if SCALED:
        found *= tl.load(column_scale + columns, inside, 0.0)
    largest = tl.maximum(tl.max(tl.abs(found), 0), 1e-12)
    tl.store(scale + row, largest / highest)
    tl.store(
        values + row * WIDTH + columns, (found * (highest / largest)).to(tl.float8e4nv), inside
    )


@triton.jit
def _add_low_rank(y, inner, b, bias, m, n, rank, b_row, b_column, BIASED: tl.constexpr,
                  RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANK)
    left = tl.load(
        inner + rows[:, None] * rank + r[None, :], (rows[:, None] < m) & (r < rank)[None, :], 0.0
    )
    right = tl.load(
        b + columns[None, :] * b_row + r[:, None] * b_column,
        (columns[None, :] < n) & (r < rank)[:, None],
        0.0,
    )
    place = rows[:, None].to(tl.int64) * n + columns[None, :]
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    found = tl.load(y + place, inside, 0.0).to(tl.float32) + tl.dot(left, right)
    if BIASED:
        found += tl.load(bias + columns, columns < n, 0.0).to(tl.float32)[None, :]
    # A hash of the place is added below bf16's last bit, and what is below is cut off.
    chance = rows.to(tl.uint32)[:, None] * 0x9E3779B1 + columns.to(tl.uint32)[None, :] * 0x85EBCA77
    chance = (chance ^ (chance >> 16)) * 0x7FEB352D
    chance = (chance ^ (chance >> 15)) * 0x846CA68B
    bits = found.to(tl.uint32, bitcast=True) + ((chance >> 16) & 0xFFFF)
    tl.store(y + place, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), inside)
