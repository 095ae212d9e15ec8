"""Models that are read and never trained: a teacher, or the initial model under a student's adapters.

Each has `read(*parts)`, which returns hidden states and head for the inputs of the student, with the same positions,
masks and packing. The inputs may come in several parts of some rows each.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compat import is_zero3_shard, prepare_frozen, shards_weights
from ..loss.teacher import ProjectedLogits
from ..model.adapters import base_model
from ..model.check import head_mismatch
from ..model.forward import install, read_teacher
from .placement import OnHost


ADAPTER = "qtarget_teacher"  # name of the teacher's adapter beside the student's


class ReadModel(ABC):
    """A model that is read beside the student, with weights of its own or with weights of the student."""

    model: Any

    @abstractmethod
    def active(self) -> contextlib.AbstractContextManager:
        """Return a context in which a call of `model` runs this model."""

    def read(self, *parts: dict[str, Any]) -> ProjectedLogits:
        """Hidden states, (B, T, D), and head; positions of virtual tokens, which only this model has, are dropped."""
        width = parts[0]["input_ids"].shape[1]
        with self.active():
            read = read_teacher(self.model, *parts)
            hidden = read.hidden[:, read.hidden.shape[1] - width :]
            return replace(read, hidden=hidden, weight=_kept(read.weight), bias=_kept(read.bias))

    def check(self, input_ids: Tensor, half: bool) -> None:
        """Raise a ValueError unless hidden states and head give the model's own log-probabilities."""
        with self.active():
            mismatch = head_mismatch(self.model, input_ids, half)
        if mismatch is not None:
            raise ValueError(
                f"The teacher or reference, a {type(base_model(self.model)).__name__}, cannot be read: {mismatch}. "
                "Pass another model or, if adapters change its head, their folder instead of the loaded model; and "
                "please report the model's name."
            )


def _kept(parameter: Tensor | None) -> Tensor | None:
    """Detached, so that it keeps its values when the context swaps other data into the parameter.

    Under ZeRO-3 the parameter stays itself: DeepSpeed gathers it by attributes that a detached tensor lacks, and no
    context swaps its data.
    """
    return parameter if parameter is None or is_zero3_shard(parameter) else parameter.detach()


class FrozenModel(ReadModel):
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

    def active(self) -> contextlib.AbstractContextManager:
        return self.on_host or contextlib.nullcontext()


class AdaptersOff(ReadModel):
    """The base weights of a PEFT student, which are the initial model: no second copy is loaded."""

    def __init__(self, model: Any):
        self.model = model

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with evaluating(self.model), self.model.disable_adapter():
            yield


class OtherAdapter(ReadModel):
    """A frozen adapter beside the trained one, over the same base weights: the base model is loaded once.

    The adapter is registered with PEFT only while the teacher reads, so that saving the student does not save it.
    """

    def __init__(self, model: Any, path: str, **kwargs: Any):
        self.model = model
        with _trainable_kept(model):
            model.load_adapter(path, ADAPTER, **kwargs)
        self.config = model.peft_config.pop(ADAPTER)
        model.register_state_dict_post_hook(_without_teacher)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        trained = self.model.active_adapter
        with evaluating(self.model), _trainable_kept(self.model):
            self.model.peft_config[ADAPTER] = self.config
            try:
                self.model.set_adapter(ADAPTER)
                yield
            finally:
                self.model.set_adapter(trained)
                del self.model.peft_config[ADAPTER]


def _without_teacher(module: Any, weights: dict[str, Any], *_: Any) -> None:
    """Remove the teacher's adapter from a state dict: PEFT removes only adapters that are registered with it."""
    for name in [name for name in weights if f".{ADAPTER}." in name]:
        del weights[name]


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
