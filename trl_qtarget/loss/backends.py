"""The choice of kernels: `triton_tiles` on devices that Triton drives, `torch_tiles` elsewhere. Both modules have:

rows(z, labels, residual, teacher, softcap)   statistics of some rows of logits, each (r,)
    .write_gradient(w_y, w_r, out)            the gradient, perhaps over the logits; its L1 norm (r,) or None
block_rows(V, dtype, device)                  the number of rows to pass to `rows` at once
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

from torch import device as Device

from . import torch_tiles


BACKENDS = ("auto", "triton", "torch")


def tiles_for(backend: str, device: Device) -> ModuleType:
    """The tiles for tensors on `device`.

    Raises:
        ValueError: an unknown backend, or "triton" on a device or installation where Triton cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
    drives = device.type in ("cuda", "xpu") or os.environ.get("TRITON_INTERPRET") == "1"
    installed = importlib.util.find_spec("triton") is not None
    if backend == "torch" or (backend == "auto" and not (installed and device.type in ("cuda", "xpu"))):
        return torch_tiles
    if not (installed and drives):
        reason = f"Triton does not drive {device.type} devices" if installed else "triton is not installed"
        raise ValueError(f"backend='triton' cannot run here: {reason}. Leave it at 'auto', or choose 'torch'.")
    from . import triton_tiles

    return triton_tiles
