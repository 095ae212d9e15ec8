"""Models that are read and never trained: a teacher, the initial weights, the student of a few updates ago.

Each has `read(inputs)`, which gives hidden states and head for the very inputs the student gets: same positions, same
masks, same packing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..compat import create_model, prepare_frozen
from ..head import install, read_teacher
from .base import ProjectedLogits


SNAPSHOT_FILE = "qtarget_snapshot.safetensors"


def load(path: str, args: Any, **kwargs: Any) -> PreTrainedModel:
    """A frozen model from a Hub id or folder, in the run's own precision unless `kwargs` say otherwise."""
    if "dtype" not in kwargs and (args.bf16 or args.fp16):
        kwargs["dtype"] = "bfloat16" if args.bf16 else "float16"
    if args.distributed_state.distributed_type != "NO":
        kwargs["device_map"] = None  # every rank holds its own copy, or its shard
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    return create_model(path, **kwargs)


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model, under its adapters where it has some."""
    return model.get_base_model() if is_peft_model(model) else model


class FrozenModel:
    """A model of its own, beside the student."""

    def __init__(self, model: PreTrainedModel, accelerator: Any):
        model.requires_grad_(False).eval()
        install(base_model(model))
        self.model = prepare_frozen(model, accelerator)

    def read(self, inputs: dict[str, Any]) -> ProjectedLogits:
        return read_teacher(self.model, inputs)


class AdaptersOff:
    """The base weights under a PEFT student: the initial model, without a second copy of it."""

    def __init__(self, model: Any):
        self.model = model

    def read(self, inputs: dict[str, Any]) -> ProjectedLogits:
        with evaluating(self.model), self.model.disable_adapter():
            return read_teacher(self.model, inputs)


class Snapshot:
    """The student of at most `every` optimizer updates ago: copies of its trainable weights, swapped in to be read.

    Before the first update, as in an evaluation of the untrained model, it is the student itself.
    """

    def __init__(self, model: Any, every: int):
        self.model, self.every = model, every
        self.taken_at = -1
        self.weights: dict[str, torch.Tensor] = {}

    def renew(self, step: int) -> None:
        """Copy the weights if it is time: before update 0, `every`, 2 `every` and so on."""
        if not self.weights or (step % self.every == 0 and step != self.taken_at):
            self.weights = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
            self.taken_at = step

    def save(self, folder: Path) -> None:
        """Keep it in a checkpoint, so that a resumed run remembers the same model."""
        weights = {name: weight.contiguous() for name, weight in self.weights.items()}
        save_file(weights, folder / SNAPSHOT_FILE, metadata={"taken_at": str(self.taken_at)})

    def load(self, folder: Path) -> None:
        """Take it from a checkpoint that has one."""
        if not (folder / SNAPSHOT_FILE).is_file():
            return
        devices = {name: p.device for name, p in self.model.named_parameters()}
        with safe_open(folder / SNAPSHOT_FILE, "pt") as file:
            self.weights = {name: file.get_tensor(name).to(devices[name]) for name in file.keys()}  # noqa: SIM118
            self.taken_at = int(file.metadata()["taken_at"])

    def read(self, inputs: dict[str, Any]) -> ProjectedLogits:
        with evaluating(self.model), self._swapped():
            teacher = read_teacher(self.model, inputs)
            # detached, the head keeps the swapped-in storage when its parameter gets the present weights back
            bias = None if teacher.bias is None else teacher.bias.detach()
            return replace(teacher, weight=teacher.weight.detach(), bias=bias)

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        parameters = dict(self.model.named_parameters())
        present = {name: parameters[name].data for name in self.weights}
        try:
            for name, weight in self.weights.items():
                parameters[name].data = weight
            yield
        finally:
            for name, data in present.items():
                parameters[name].data = data


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No dropout and no gradient checkpointing, for one forward pass."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
