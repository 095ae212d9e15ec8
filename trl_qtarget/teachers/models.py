"""Models that are read and never trained: a teacher, the initial weights, the student of a few updates ago.

Each has `read(*parts)`, which gives hidden states and head for the very inputs the student gets, whole or some rows at
a time: same positions, same masks, same packing.
"""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..compat import prepare_frozen, shards_weights
from ..loss.products import wide
from ..loss.teacher import ProjectedLogits
from ..model.adapters import base_model
from ..model.forward import install, read_teacher
from ..theory.target import Target
from .loading import revision_of, shares_base
from .placement import OnHost


ADAPTER = "qtarget_teacher"  # its name beside the student's own


class FrozenModel:
    """A model of its own, beside the student; with `offload`, its weights are there only while they are read.

    Raises:
        ValueError: weights to offload of which each rank holds parts.
    """

    def __init__(self, model: PreTrainedModel, accelerator: Any, offload: bool = False):
        if offload and shards_weights(accelerator):
            raise ValueError(
                "teacher_offload moves whole weights, and FSDP or ZeRO-3 shards the teacher: leave it out, or let the "
                "engine offload (fsdp_offload_params, offload_param_device)."
            )
        model.requires_grad_(False).eval()
        install(base_model(model))
        self.model = prepare_frozen(model, accelerator, placed=not offload)
        self.on_host = OnHost(model, accelerator.device) if offload else None

    def read(self, *parts: dict[str, Any]) -> ProjectedLogits:
        if self.on_host is None:
            return read_teacher(self.model, *parts)
        with self.on_host:
            return _detached(read_teacher(self.model, *parts))


class AdaptersOff:
    """The base weights under a PEFT student: the initial model, without a second copy of it."""

    def __init__(self, model: Any):
        self.model = model

    def read(self, *parts: dict[str, Any]) -> ProjectedLogits:
        with evaluating(self.model), self.model.disable_adapter():
            return read_teacher(self.model, *parts)


class OtherAdapter:
    """A frozen adapter beside the trained one, over the same base weights: a teacher without a second copy of them.

    PEFT knows of it only while it is read, so that it is never saved.
    """

    def __init__(self, model: Any, path: str, **kwargs: Any):
        self.model = model
        with _trainable_kept(model):
            model.load_adapter(path, ADAPTER, **kwargs)
        self.config = model.peft_config.pop(ADAPTER)
        model.register_state_dict_post_hook(_without_teacher)

    def read(self, *parts: dict[str, Any]) -> ProjectedLogits:
        trained = self.model.active_adapter
        with evaluating(self.model), _trainable_kept(self.model):
            self.model.peft_config[ADAPTER] = self.config
            try:
                self.model.set_adapter(ADAPTER)
                return read_teacher(self.model, *parts)
            finally:
                self.model.set_adapter(trained)
                del self.model.peft_config[ADAPTER]


def _without_teacher(module: Any, weights: dict[str, Any], *_: Any) -> None:
    """PEFT leaves adapters that it knows of out of what it saves of another, and of this one it does not know."""
    for name in [name for name in weights if f".{ADAPTER}." in name]:
        del weights[name]


class Remembered(ABC):
    """An earlier student: copies of its trainable weights, swapped in to be read.

    Before the first update, as in an evaluation of the untrained model, it is the student itself.
    """

    file: str

    def __init__(self, model: Any):
        self.model = model
        self.taken_at = -1
        self.weights: dict[str, torch.Tensor] = {}

    def trainable(self) -> dict[str, torch.Tensor]:
        """The weights of the student as they are now."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    @abstractmethod
    def renew(self, step: int) -> None:
        """Bring the copies to what they are before update number `step`."""

    def save(self, folder: Path) -> None:
        """Keep it in a checkpoint, so that a resumed run remembers the same model."""
        weights = {name: weight.contiguous() for name, weight in self.weights.items()}
        save_file(weights, folder / self.file, metadata={"taken_at": str(self.taken_at)})

    def load(self, folder: Path) -> None:
        """Take it from a checkpoint that has one."""
        if not (folder / self.file).is_file():
            warnings.warn(f"{folder} has no {self.file}: what it remembers starts from its weights.", stacklevel=2)
            return
        devices = {name: p.device for name, p in self.model.named_parameters()}
        with safe_open(folder / self.file, "pt") as file:
            self.weights = {name: file.get_tensor(name).to(devices[name]) for name in file.keys()}  # noqa: SIM118
            self.taken_at = int(file.metadata()["taken_at"])

    def read(self, *parts: dict[str, Any]) -> ProjectedLogits:
        with evaluating(self.model), self._swapped():
            return _detached(read_teacher(self.model, *parts))

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        parameters = dict(self.model.named_parameters())
        present = {name: parameters[name].data for name in self.weights}
        try:
            for name, weight in self.weights.items():
                parameters[name].data = weight.to(present[name].dtype)
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
        """Copy the weights if it is time: before update 0, `every`, 2 `every` and so on."""
        if not self.weights or (step % self.every == 0 and step != self.taken_at):
            self.weights = {name: weight.clone() for name, weight in self.trainable().items()}
            self.taken_at = step


class Average(Remembered):
    """The exponential moving average of the student over its updates, in float32 or wider."""

    file = "qtarget_average.safetensors"

    def __init__(self, model: Any, decay: float):
        super().__init__(model)
        self.decay = decay

    def renew(self, step: int) -> None:
        """Average in the weights that the last update has left."""
        if step == self.taken_at:
            return
        for name, weight in self.trainable().items():
            kept = self.weights.setdefault(name, weight.to(wide(weight.dtype), copy=True))
            kept.lerp_(weight.to(kept.dtype), 1 - self.decay)
        self.taken_at = step


def _detached(teacher: ProjectedLogits) -> ProjectedLogits:
    """With a head that keeps its storage when its parameter gets another one."""
    bias = None if teacher.bias is None else teacher.bias.detach()
    return replace(teacher, weight=teacher.weight.detach(), bias=bias)


def within_student(student: Any, teacher: Any, target: Target, args: Any, accelerator: Any) -> Any:
    """The second model, where all its weights or most of them are the student's own; None where it stands apart.

    Raises:
        ValueError: copies of weights of which each rank holds parts: what is swapped in would never be gathered; or
            weights to offload that the student needs too.
    """
    if ("snapshot" in target.needs or args.teacher_ema_decay is not None) and shards_weights(accelerator):
        raise ValueError(
            "psft and teacher_ema_decay keep copies of the student's weights, and FSDP or ZeRO-3 shards them: train "
            "with DDP or ZeRO-2, or with another loss or teacher."
        )
    inside: Any = None
    if "snapshot" in target.needs:
        inside = Snapshot(student, target.snapshot_every)
    elif args.teacher_ema_decay is not None:
        inside = Average(student, args.teacher_ema_decay)
    elif teacher is None:
        inside = AdaptersOff(student)
    elif isinstance(teacher, str) and shares_base(student, teacher, args):
        inside = OtherAdapter(student, teacher, **revision_of(args))
    if inside is not None and args.teacher_offload:
        raise ValueError(
            "teacher_offload is for a teacher with weights of its own, and this one has the student's: leave it out."
        )
    return inside


@contextlib.contextmanager
def _trainable_kept(model: torch.nn.Module) -> Iterator[None]:
    """Whatever PEFT does in between, the same parameters require a gradient afterwards, and no new one does."""
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    try:
        yield
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(name in trainable)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No dropout and no gradient checkpointing, for one forward pass."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
