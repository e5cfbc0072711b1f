"""silu(gate) · up, LoRA's part of both added on the way in; Triton, for NVIDIA GPUs.

The wide rows of an MLP cost more to move than to compute. So LoRA's low-rank part never becomes a
tensor of its own: it is formed in registers where gate, up and the gradient are read anyway.
Gate and up lie beside each other in one tensor (M, 2 N), and so do their b in (2 N, r).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 128  # the fastest of twenty on an H100


def swiglu(wide: Tensor, inner: Tensor, b: Tensor) -> Tensor:
    """silu(gate) · up, of [gate, up] = wide + inner bᵀ.

    Shapes: wide (M, 2 N), inner (M, r), b (2 N, r); returns (M, N).
    """
    rows, width = wide.shape[0], wide.shape[1] // 2
    output = wide.new_empty(rows, width)
    _forward[_grid(output)](
        wide, inner, b, output, rows, width, b.shape[1], RANK=_rank(b), ROWS=ROWS, COLUMNS=COLUMNS
    )
    return output


def swiglu_backward(
    gradient: Tensor, of_down: Tensor, a_down: Tensor, wide: Tensor, inner: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of [gate, up], (M, 2 N), and the output of `swiglu` in place of `gradient`.

    The output's gradient is `gradient` (M, N) + of_down (M, r) a_down (r, N).
    """
    of_wide = torch.empty_like(wide)
    _backward[_grid(gradient)](
        gradient, of_down, a_down, wide, inner, b, of_wide, *gradient.shape, a_down.shape[0],
        b.shape[1], RANK=_rank(a_down.T, b), ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return of_wide, gradient


def _rank(*matrices: Tensor) -> int:
    """The width of a tile that holds every rank; a tensor core wants 16 or more."""
    rank: int = triton.next_power_of_2(max(16, *(matrix.shape[1] for matrix in matrices)))
    return rank


def _grid(narrow: Tensor) -> tuple[int, int]:
    rows, columns = narrow.shape
    return triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)


@triton.jit
def _tile(wide, left, b, offset, rows, columns, m, n, rank, RANK: tl.constexpr):
    """One tile of wide + left bᵀ, in float32, its columns from `offset` on."""
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    place = rows[:, None].to(tl.int64) * (2 * n) + offset + columns[None, :]
    base = tl.load(wide + place, inside, 0.0)
    r = tl.arange(0, RANK)
    right = tl.load(
        b + (offset + columns[None, :]) * rank + r[:, None],
        (columns[None, :] < n) & (r < rank)[:, None],
        0.0,
    )
    return base.to(tl.float32) + tl.dot(left, right)


@triton.jit
def _narrow(low, rows, m, rank, RANK: tl.constexpr):
    """Some rows of a (M, r) matrix, zeros behind them up to RANK."""
    r = tl.arange(0, RANK)
    inside = (rows[:, None] < m) & (r < rank)[None, :]
    return tl.load(low + rows[:, None] * rank + r[None, :], inside, 0.0)


@triton.jit
def _forward(wide, inner, b, output, m, n, rank,
             RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    left = _narrow(inner, rows, m, rank, RANK)
    g = _tile(wide, left, b, 0, rows, columns, m, n, rank, RANK)
    u = _tile(wide, left, b, n, rows, columns, m, n, rank, RANK)
    value = g * tl.sigmoid(g) * u
    place = rows[:, None].to(tl.int64) * n + columns[None, :]
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(output + place, value.to(output.dtype.element_ty), inside)


@triton.jit
def _backward(gradient, of_down, a_down, wide, inner, b, of_wide, m, n, rank_down, rank,
              RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = rows[:, None].to(tl.int64) * n + columns[None, :]
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    r = tl.arange(0, RANK)
    right = tl.load(
        a_down + r[:, None] * n + columns[None, :],
        (columns[None, :] < n) & (r < rank_down)[:, None],
        0.0,
    )
    low = _narrow(of_down, rows, m, rank_down, RANK)
    d = tl.load(gradient + place, inside, 0.0).to(tl.float32) + tl.dot(low, right)
    left = _narrow(inner, rows, m, rank, RANK)
    g = _tile(wide, left, b, 0, rows, columns, m, n, rank, RANK)
    u = _tile(wide, left, b, n, rows, columns, m, n, rank, RANK)
    gated = tl.sigmoid(g)
    kind = gradient.dtype.element_ty
    beside = place + rows[:, None].to(tl.int64) * n  # the same place in a row of 2 N
    tl.store(of_wide + beside, (d * u * gated * (1 + g * (1 - gated))).to(kind), inside)
    tl.store(of_wide + beside + n, (d * g * gated).to(kind), inside)
    tl.store(gradient + place, (g * gated * u).to(kind), inside)
