"""A frozen linear layer in fp8 (e4m3), both directions on fp8 tensor cores.

Each row of the weight has its scale, and so has each row of what it is multiplied with; Hopper or
newer. Only one set of values is kept: for the way back the weight is turned, not rounded again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

HIGHEST = 448.0  # of e4m3


class Float8Linear(nn.Linear):
    """Takes the place of an `nn.Linear` that is not trained; its weight keeps the shape (out, in).

    Attributes:
        row_scale: What each row of the weight is multiplied with, (out,) float32.
        turned: The weight's values as (in, out), for the gradient of the input.
    """

    row_scale: Tensor
    turned: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        out_features, in_features = layer.weight.shape
        super().__init__(in_features, out_features, bias=False, device="meta")
        values, scale = quantise_rows(layer.weight.detach())
        self.weight = nn.Parameter(values, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("row_scale", scale[:, 0], persistent=False)
        self.register_buffer("turned", values.T.contiguous(), persistent=False)

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
    ones = torch.ones(1, len(turned), device=of_y.device)
    return torch._scaled_mm(
        values, turned.T, scale, ones, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def quantise_rows(x: Tensor, column_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x · column_scale as e4m3 values (M, N) times a scale for each row, (M, 1) float32."""
    rows, width = x.shape
    values = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    columns = x if column_scale is None else column_scale
    _quantise[(rows,)](
        x, columns, values, scale, HIGHEST, WIDTH=width, COLUMNS=triton.next_power_of_2(width),
        SCALED=column_scale is not None, num_warps=16 if width > 8192 else 4,
    )  # fmt: skip
    return values, scale


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
