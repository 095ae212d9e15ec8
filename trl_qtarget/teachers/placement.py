"""Where the weights of a model that is only read are between steps, and how many rows of a batch it reads at once."""

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

    The host's copies are never changed, so leaving the context moves nothing: the device's are dropped, but for what
    somebody still refers to.
    """

    def __init__(
        self, model: Module, device: torch.device, fetch: Callable[[Tensor, torch.device], Tensor] | None = None
    ):
        self.fetch = fetch or (lambda weight, device: weight.to(device, non_blocking=True))
        self.device = device
        self.weights = [*model.parameters(), *model.buffers()]
        self.kept = [x.data.cpu() for x in self.weights]
        if device.type == "cuda":
            self.kept = [x.pin_memory() for x in self.kept]  # pageable memory is copied twice, and holds up the host
        self.__exit__()

    def __enter__(self) -> None:
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.data = self.fetch(kept, self.device)

    def __exit__(self, *_: Any) -> None:
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.data = kept


def read_in_parts(teacher: Any, inputs: dict[str, Any], size: int | None, accelerator: Any) -> ProjectedLogits:
    """What a teacher says of a batch of which it reads up to `size` rows at once.

    Ranks that hold parts of the weights gather them together. So all read as often as the one that has most rows, the
    others their last part again.
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
