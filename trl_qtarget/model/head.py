"""The output head of a transformers model: its weights, its bias, and what its configuration does to logits."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Partial
from transformers import PreTrainedModel

from ..loss.products import Head


SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")  # as configurations call it


def read_head(model: PreTrainedModel) -> Head:
    """The model's output head, with the scale and the softcap its configuration puts on logits."""
    head: Any = model.get_output_embeddings()
    config = model.config.get_text_config()
    # PEFT's wrapper around a tied head of which single rows are trained has a weight of its own and no bias
    bias = head.bias if hasattr(head, "bias") else head.original_module.bias
    weight, bias = (_whole(x) if hasattr(x, "full_tensor") else x for x in (head.weight, bias))
    softcap = next((getattr(config, name) for name in SOFTCAPS if getattr(config, name, None) is not None), None)
    return Head(weight, bias, _logit_scale(config), softcap)


def _whole(sharded: Any) -> Tensor:
    """All of a DTensor. Each rank has a gradient of its own for it, and a shard gets the mean of them, as in FSDP."""
    whole = sharded.full_tensor(grad_placements=[Partial()] * sharded.device_mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / sharded.device_mesh.size())
    return whole


def head_rows(model: PreTrainedModel) -> int:
    """Rows of the model's output head, also where ZeRO-3 keeps none of them here."""
    weight: Any = model.get_output_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]


def _logit_scale(config: Any) -> float:
    """The factor on logits, under each name that transformers' configurations have for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)  # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1 / scaling


def gathered(*parameters: Any) -> contextlib.AbstractContextManager:
    """Parameters that ZeRO-3 has split are whole inside this context; elsewhere it does nothing.

    What is whole already is in use by a forward pass that goes on, and is left to that.
    """
    split = {id(p): p for p in parameters if hasattr(p, "ds_id") and p.ds_status.name != "AVAILABLE"}
    if not split:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(split.values()))


def dense_logits(hidden: Tensor, head: Head) -> Tensor:
    logits = torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float() * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
