"""Numbers beside tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def shifted(x: Tensor, fill: float = 0) -> Tensor:  # (B, T)
    """Each position gets the value of the token that comes next."""
    return torch.nn.functional.pad(x[:, 1:], (0, 1), value=fill)
