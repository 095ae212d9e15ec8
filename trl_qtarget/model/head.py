"""The output head of a transformers model, and the softcap and scale that its configuration puts on logits."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Partial
from transformers import PreTrainedModel

from ..compat import is_zero3_shard, zero3_shape
from ..loss.products import Head


SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")  # names in configurations
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # names of a factor on logits


def read_head(model: PreTrainedModel) -> Head:
    """The model's output head; a head that FSDP2 has sharded is gathered."""
    head: Any = model.get_output_embeddings()
    config = model.config.get_text_config()
    # PEFT's wrapper around a tied head with single trained rows has its own weight and no bias
    bias = head.bias if hasattr(head, "bias") else head.original_module.bias
    weight, bias = (_gather(x) if hasattr(x, "full_tensor") else x for x in (head.weight, bias))
    softcap = next((getattr(config, name) for name in SOFTCAPS if getattr(config, name, None) is not None), None)
    return Head(weight, bias, _logit_scale(config), softcap)


def _gather(sharded: Any) -> Tensor:
    """The full tensor of a DTensor. Each rank computes a gradient of it, and a shard gets their mean, as in FSDP."""
    whole = sharded.full_tensor(grad_placements=[Partial()] * sharded.device_mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / sharded.device_mesh.size())
    return whole


def _logit_scale(config: Any) -> float:
    """The factor on logits, under each name that configurations of transformers have for it."""
    for name in FACTORS:
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)  # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1 / scaling


def head_rows(model: PreTrainedModel) -> int:
    """Rows of the model's output head, also under ZeRO-3, where the local weight has none."""
    weight: Any = model.get_output_embeddings().weight
    return zero3_shape(weight)[0]


def gathered(*parameters: Any) -> contextlib.AbstractContextManager:
    """Gather parameters that ZeRO-3 has sharded, for the length of the context; elsewhere the context does nothing.

    Parameters that are already gathered are skipped: an enclosing forward pass owns them, and would find them sharded
    again when the context ends.
    """
    split = {id(p): p for p in parameters if is_zero3_shard(p)}
    if not split:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(split.values()))


def dense_logits(hidden: Tensor, head: Head) -> Tensor:  # (n, D) -> (n, V)
    """The logits themselves in float32, for a few tokens: the checks of the first step compare with them."""
    return logits_of(torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float(), head)


def logits_of(z: Tensor, head: Head) -> Tensor:
    """Scale and softcap of the head on `z = h W^T + b`."""
    logits = z * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
