"""Models that are read and never trained: a teacher, the initial weights, the student of a few updates ago.

Each has `read(*parts)`, which returns hidden states and head for the inputs of the student, with the same positions,
masks and packing. The inputs may come in several parts of some rows each.
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


ADAPTER = "qtarget_teacher"  # name of the teacher's adapter beside the student's


class FrozenModel:
    """A second model beside the student; with `offload` its weights are on the device only while it reads.

    Raises:
        ValueError: `offload` under FSDP or ZeRO-3, where each rank holds a shard of the weights.
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
    """The base weights of a PEFT student, which are the initial model: no second copy is loaded."""

    def __init__(self, model: Any):
        self.model = model

    def read(self, *parts: dict[str, Any]) -> ProjectedLogits:
        with evaluating(self.model), self.model.disable_adapter():
            return read_teacher(self.model, *parts)


class OtherAdapter:
    """A frozen adapter beside the trained one, over the same base weights: the base model is loaded once.

    The adapter is registered with PEFT only while the teacher reads, so that saving the student does not save it.
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
    """Remove the teacher's adapter from a state dict: PEFT removes only adapters that are registered with it."""
    for name in [name for name in weights if f".{ADAPTER}." in name]:
        del weights[name]


class Remembered(ABC):
    """An earlier student: copies of its trainable weights, which are swapped in while the model reads.

    Before the first update, as in an evaluation of the untrained model, there are no copies and the student reads.
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
        """Copy the weights before the updates 0, `every`, 2 * `every` and so on."""
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
        """Move the average towards the weights after the last update."""
        if step == self.taken_at:
            return
        for name, weight in self.trainable().items():
            kept = self.weights.setdefault(name, weight.to(wide(weight.dtype), copy=True))
            kept.lerp_(weight.to(kept.dtype), 1 - self.decay)
        self.taken_at = step


def _detached(teacher: ProjectedLogits) -> ProjectedLogits:
    """The same with a head that keeps its values when other data is swapped into its parameters."""
    bias = None if teacher.bias is None else teacher.bias.detach()
    return replace(teacher, weight=teacher.weight.detach(), bias=bias)


def within_student(student: Any, teacher: Any, target: Target, args: Any, accelerator: Any) -> Any:
    """The second model if it shares most weights with the student, else None.

    Raises:
        ValueError: a snapshot or average under FSDP or ZeRO-3, where weights swapped into one rank's shard would never
            be gathered; or `teacher_offload` for weights that the student needs as well.
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
            "teacher_offload is for a teacher with weights of its own, and this teacher shares the student's: leave "
            "it out."
        )
    return inside


@contextlib.contextmanager
def _trainable_kept(model: torch.nn.Module) -> Iterator[None]:
    """Restore which parameters require a gradient when the context ends: PEFT changes that as it switches adapters."""
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    try:
        yield
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(name in trainable)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode for the length of the context: no dropout, no gradient checkpointing."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
