"""Earlier versions of the student: copies of its trainable weights, swapped in while the earlier student reads."""

from __future__ import annotations

import contextlib
import sys
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..loss.products import wide
from .models import ReadModel, evaluating


class Remembered(ReadModel):
    """An earlier student: copies of its trainable weights, which are swapped in while the model reads.

    Before the first update, as in an evaluation of the untrained model, no copies exist yet, and the student itself is
    read.
    """

    file: str

    def __init__(self, model: Any):
        self.model = model
        self.taken_at = -1
        self.weights: dict[str, torch.Tensor] = {}

    def trainable(self) -> dict[str, torch.Tensor]:
        """The student's current trainable weights, by name."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    @abstractmethod
    def renew(self, step: int) -> None:
        """Bring the copies to their values before optimizer update number `step`."""

    def save(self, folder: Path) -> None:
        """Write the copies into a checkpoint, so that a resumed run reads the same earlier student."""
        weights = {name: weight.contiguous() for name, weight in self.weights.items()}
        save_file(weights, folder / self.file, metadata={"taken_at": str(self.taken_at)})

    def load(self, folder: Path) -> None:
        """Read the copies from a checkpoint; without a file in it, warn and start from the current weights."""
        if not (folder / self.file).is_file():
            warnings.warn(
                f"{folder} has no {self.file}: the earlier student of the loss starts from the current weights.",
                stacklevel=2,
            )
            return
        devices = {name: p.device for name, p in self.model.named_parameters()}
        with safe_open(folder / self.file, "pt") as file:
            self.weights = {name: file.get_tensor(name).to(devices[name]) for name in file.keys()}  # noqa: SIM118
            self.taken_at = int(file.metadata()["taken_at"])

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        parameters = dict(self.model.named_parameters())
        present = {name: parameters[name].data for name in self.weights}
        try:
            for name, weight in self.weights.items():
                parameters[name].data = weight.to(present[name].dtype)
            with evaluating(self.model):
                yield
        finally:
            for name, data in present.items():
                parameters[name].data = data


class Snapshot(Remembered):
    """The student of at most `every` optimizer updates ago."""

    file = "qtarget_snapshot.safetensors"

    def __init__(self, model: Any, every: int):
        super().__init__(model)
        self.every = every

    def renew(self, step: int) -> None:
        """Copy the weights before the updates 0, `every`, 2 * `every` and so on."""
        if not self.weights or (step % self.every == 0 and step != self.taken_at):
            self.weights = {name: weight.clone() for name, weight in self.trainable().items()}
            self.taken_at = step


class Initial(Snapshot):
    """The student before its first update, for students whose base weights are not the initial model."""

    file = "qtarget_initial.safetensors"

    def __init__(self, model: Any):
        super().__init__(model, every=sys.maxsize)
        self.renew(0)


class Average(Remembered):
    """The exponential moving average of the student over its updates, in float32 or wider."""

    file = "qtarget_average.safetensors"

    def __init__(self, model: Any, decay: float):
        super().__init__(model)
        self.decay = decay

    def renew(self, step: int) -> None:
        """Move the average towards the weights after the last update."""
        if step == self.taken_at:
            return
        for name, weight in self.trainable().items():
            if name not in self.weights:
                self.weights[name] = weight.to(wide(weight.dtype), copy=True)
            else:
                self.weights[name].lerp_(weight.to(self.weights[name].dtype), 1 - self.decay)
        self.taken_at = step
