"""Two ways to save a teacher's memory: its weights wait in host memory, or it reads a batch a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..compat import shards_weights
from ..loss.teacher import ProjectedLogits


class OnHost:
    """Keeps a frozen model's weights in host memory; inside the context they are on `device`.

    The host's copies never change, so leaving the context copies nothing back: the device's copies are freed, unless
    a tensor outside the model still refers to them.
    """

    def __init__(
        self, model: Module, device: torch.device, fetch: Callable[[Tensor, torch.device], Tensor] | None = None
    ):
        self.fetch = fetch or (lambda weight, device: weight.to(device, non_blocking=True))
        self.device = device
        self.weights = [*model.parameters(), *model.buffers()]
        self.kept = [x.data.cpu() for x in self.weights]
        if device.type == "cuda":
            self.kept = [x.pin_memory() for x in self.kept]  # a copy from pageable memory blocks the host
        self.__exit__()

    def __enter__(self) -> None:
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.data = self.fetch(kept, self.device)

    def __exit__(self, *_: Any) -> None:
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.data = kept


def read_in_parts(teacher: Any, inputs: dict[str, Any], size: int | None, accelerator: Any) -> ProjectedLogits:
    """Hidden states and head of a teacher that reads at most `size` rows of the batch at once.

    With sharded weights every forward pass is a collective operation, so all ranks must read equally often: a rank
    with fewer parts reads its last part again.
    """
    rows = len(inputs["input_ids"])
    parts = [inputs]
    if size is not None:
        parts = [
            {name: x[start : start + size] if isinstance(x, Tensor) else x for name, x in inputs.items()}
            for start in range(0, rows, size)
        ]
        if shards_weights(accelerator):
            most = accelerator.gather(torch.tensor([len(parts)], device=accelerator.device)).max()
            parts += parts[-1:] * (int(most) - len(parts))
    return teacher.read(*parts).take(slice(rows))
