"""silu(gate) · up, LoRA's part of both added on the way in; Triton, for NVIDIA GPUs.

The wide rows of an MLP cost more to move than to compute. So LoRA's low-rank part never becomes a
tensor of its own: it is formed in registers where gate, up and the gradient are read anyway.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 128  # the fastest of twenty on an H100


def swiglu(
    gate: Tensor, up: Tensor, inner: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor],
    scale: tuple[float, float],
) -> Tensor:  # fmt: skip
    """silu(gate + s₀ i₀ b₀ᵀ) · (up + s₁ i₁ b₁ᵀ).

    Shapes: gate and up (M, N), inner (M, r) twice, b (N, r) twice; returns (M, N).
    """
    output = torch.empty_like(gate)
    _forward[_grid(gate)](
        gate, up, inner[0], inner[1], b[0], b[1], output, *gate.shape, *scale,
        *_ranks(b), RANK=_rank(*b), ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return output


def swiglu_backward(
    gradient: Tensor, of_down: Tensor, a_down: Tensor, gate: Tensor, up: Tensor,
    inner: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], scale: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of gate and up, and the output of `swiglu` again, in place of `gradient`.

    The output's gradient is `gradient` (M, N) + of_down (M, r) a_down (r, N).
    """
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    _backward[_grid(gate)](
        gradient, of_down, a_down, gate, up, inner[0], inner[1], b[0], b[1], of_gate, of_up,
        *gate.shape, *scale, a_down.shape[0], *_ranks(b),
        RANK=_rank(a_down.T, *b), ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return of_gate, of_up, gradient


def _ranks(b: tuple[Tensor, Tensor]) -> tuple[int, int]:
    return b[0].shape[1], b[1].shape[1]


def _rank(*matrices: Tensor) -> int:
    """The width of a tile that holds every rank; a tensor core wants 16 or more."""
    rank: int = triton.next_power_of_2(max(16, *(matrix.shape[1] for matrix in matrices)))
    return rank


def _grid(whole: Tensor) -> tuple[int, int]:
    rows, columns = whole.shape
    return triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)


@triton.jit
def _tile(start, width, inner, b, rows, columns, m, n,
          scale, rank, RANK: tl.constexpr):  # fmt: skip
    """One tile of start + scale · inner bᵀ, in float32; all lie row by row in memory."""
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    base = tl.load(start + rows[:, None].to(tl.int64) * width + columns[None, :], inside, 0.0)
    r = tl.arange(0, RANK)
    left = tl.load(
        inner + rows[:, None] * rank + r[None, :], (rows[:, None] < m) & (r < rank)[None, :], 0.0
    )
    right = tl.load(
        b + columns[None, :] * rank + r[:, None], (columns[None, :] < n) & (r < rank)[:, None], 0.0
    )
    return base.to(tl.float32) + scale * tl.dot(left, right)


@triton.jit
def _forward(gate, up, inner0, inner1, b0, b1, output,
             m, n, scale0, scale1, rank0, rank1,
             RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    g = _tile(gate, n, inner0, b0, rows, columns, m, n, scale0, rank0, RANK)
    u = _tile(up, n, inner1, b1, rows, columns, m, n, scale1, rank1, RANK)
    value = g * tl.sigmoid(g) * u
    place = rows[:, None].to(tl.int64) * n + columns[None, :]
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(output + place, value.to(output.dtype.element_ty), inside)


@triton.jit
def _backward(gradient, of_down, a_down, gate, up, inner0,
              inner1, b0, b1, of_gate, of_up, m, n,
              scale0, scale1, rank, rank0, rank1,
              RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = rows[:, None].to(tl.int64) * n + columns[None, :]
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    r = tl.arange(0, RANK)
    left = tl.load(
        of_down + rows[:, None] * rank + r[None, :], (rows[:, None] < m) & (r < rank)[None, :], 0.0
    )
    right = tl.load(
        a_down + r[:, None] * n + columns[None, :],
        (columns[None, :] < n) & (r < rank)[:, None],
        0.0,
    )
    d = tl.load(gradient + place, inside, 0.0).to(tl.float32) + tl.dot(left, right)
    g = _tile(gate, n, inner0, b0, rows, columns, m, n, scale0, rank0, RANK)
    u = _tile(up, n, inner1, b1, rows, columns, m, n, scale1, rank1, RANK)
    gated = tl.sigmoid(g)
    kind = gradient.dtype.element_ty
    tl.store(of_up + place, (d * g * gated).to(kind), inside)
    tl.store(of_gate + place, (d * u * gated * (1 + g * (1 - gated))).to(kind), inside)
    tl.store(gradient + place, (g * gated * u).to(kind), inside)
