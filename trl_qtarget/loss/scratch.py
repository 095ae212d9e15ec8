"""Memory for tiles that one call leaves to the next.

On a CPU fresh pages are dear: touching them for the first time costs more than all passes over a tile. So the tiles of
a thread are kept, few in number and none above `KEPT_BYTES`. Allocators of accelerators do it already.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


KEPT_BYTES = 2**28


class Kept(threading.local):
    """Flat buffers of this thread by name and dtype."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


KEPT = Kept()


def scratch(name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor beside `like`, which holds until `name` is asked for again in this thread."""
    dtype = like.dtype if dtype is None else dtype
    size, key = math.prod(shape), (name, dtype)
    plain = type(like) in (Tensor, torch.nn.Parameter)  # a subclass, as of tracing, is not to meet ordinary tensors
    if like.device.type != "cpu" or not plain or size * dtype.itemsize > KEPT_BYTES:
        return like.new_empty(shape, dtype=dtype)
    buffer = KEPT.buffers.get(key)
    if buffer is None or len(buffer) < size:
        # inference tensors could not be written in a training step later
        with torch.inference_mode(False):
            buffer = KEPT.buffers[key] = torch.empty(size, dtype=dtype, device=like.device)
    return buffer[:size].view(shape)
