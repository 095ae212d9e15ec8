"""Buffers for tiles, kept from one call of the loss to the next.

On a CPU the first write to fresh pages costs more than all passes over a tile. So each thread keeps its few tiles, as
long as none is larger than `KEPT_BYTES`. Allocators of accelerators keep freed memory by themselves.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


KEPT_BYTES = 2**28


class Kept(threading.local):
    """The flat buffers of the current thread, by name and dtype."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


KEPT = Kept()


def scratch(name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor on the device of `like`; the next call with `name` in this thread may overwrite it."""
    dtype = like.dtype if dtype is None else dtype
    size, key = math.prod(shape), (name, dtype)
    plain = type(like) in (Tensor, torch.nn.Parameter)  # subclasses such as FakeTensor cannot mix with plain tensors
    if like.device.type != "cpu" or not plain or size * dtype.itemsize > KEPT_BYTES:
        return like.new_empty(shape, dtype=dtype)
    buffer = KEPT.buffers.get(key)
    if buffer is None or len(buffer) < size:
        # inference tensors could not be written in a training step later
        with torch.inference_mode(False):
            buffer = KEPT.buffers[key] = torch.empty(size, dtype=dtype, device=like.device)
    return buffer[:size].view(shape)
