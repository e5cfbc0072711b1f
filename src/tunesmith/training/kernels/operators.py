"""Functions of tensors made known to PyTorch, so that a compiled layer calls them as they are.

They are registered by hand: what `custom_op` checks at each call takes longer than the call.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("tunesmith", "FRAGMENT")


def operator(plain: Callable[..., Any], shapes: Callable[..., Any]) -> Callable[..., Any]:
    """Register a function that makes new tensors on a GPU; `shapes` makes empty ones like them.

    The schema is read off the signature.
    """
    name = plain.__name__.removeprefix("_")
    _LIBRARY.define(name + torch.library.infer_schema(plain, mutates_args=()))
    _LIBRARY.impl(name, plain, "CUDA")
    torch.library.register_fake(f"tunesmith::{name}", shapes, lib=_LIBRARY)
    found: Callable[..., Any] = getattr(torch.ops.tunesmith, name).default
    return found
