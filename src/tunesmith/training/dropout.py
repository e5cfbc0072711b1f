"""Which entries dropout keeps.

PyTorch draws a number for each on a CPU, one thread at a time, which takes as long as the matrix
product behind it. Here four entries share one draw of 64 bits, 16 each.
"""

import torch
from torch import Tensor

LEVELS = 1 << 16


def kept(x: Tensor, probability: float) -> Tensor:
    """True where an entry of `x` is kept: each by itself, all but `probability` of them; bool.

    On a CPU the probability is rounded to a 65,536th. Draws from PyTorch's own generator.
    """
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - probability)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64)
    draws.random_(torch.iinfo(torch.int64).min, None)
    uniform = draws.view(torch.int16)[: x.numel()].view(x.shape)
    return uniform >= round(probability * LEVELS) - LEVELS // 2
