"""Which tiles serve a device. `torch_tiles` is the one backend so far; its twins have the same `rows` function."""

from types import ModuleType

from torch import device as Device

from . import torch_tiles


BACKENDS = ("auto", "torch")


def tiles_for(backend: str, device: Device) -> ModuleType:
    """The module whose `rows` and `block_rows` serve tensors on `device`.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
    return torch_tiles
