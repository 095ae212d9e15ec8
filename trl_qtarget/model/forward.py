"""A forward that stops at the last hidden states and passes them on with the head, so that no logits are made.

`model(**inputs, qtarget=reader)` runs the backbone and returns `reader(hidden, labels, head, aux_loss)`. Without the
keyword the forward is the model's own, so generation and saving are unchanged. This module holds the only assignment
to `model.forward` in the package. The forward is called through everything that wraps the model (DDP, FSDP, DeepSpeed,
autocast), and backbone and head are looked up in each call, because PEFT and FSDP replace them.

    DDP, FSDP1   the wrapper's forward runs as usual; gradients of the head flow through its parameter
    FSDP2        a head that is still sharded is a DTensor: gathered once, before the loss, and its gradient reduced
    ZeRO-3       heads are gathered around the loss (`head.gathered`)
    LoRA         a frozen head gets no product and no buffer
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compat import backbone, balancing_loss, forward_of_instance
from ..loss.per_token import shifted_labels
from ..loss.products import Head
from ..loss.teacher import ProjectedLogits
from .head import read_head


EXPERTS = ("num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts")  # names in configurations
CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk")

Reader = Callable[[Tensor, Tensor, Head, Tensor | None], Any]  # hidden (B, T, D), labels (B, T), head, aux_loss


def install(model: PreTrainedModel) -> None:
    """Give `model` the forward of this module. Call it on the base model of a PEFT model, before any wrapping."""
    backbone(model)  # a model without one is refused here and not in the first step
    # kept on the model, where `copy.deepcopy` binds it to the copy; a closure would run the original's weights
    before: Any = forward_of_instance(model)
    model._forward_before_qtarget = before

    # transformers reads the signature to decide which inputs a model accepts, so it stays the original's
    @functools.wraps(type(model).forward)
    def forward(self, *args, qtarget: Reader | None = None, **kwargs):
        if qtarget is None:
            before = self._forward_before_qtarget
            return type(self).forward(self, *args, **kwargs) if before is None else before(*args, **kwargs)
        given = {name: kwargs.pop(name, None) for name in ("labels", "shift_labels")}
        kwargs.pop("num_items_in_batch", None)
        outputs = backbone(self)(*args, **kwargs)
        head = read_head(self)
        hidden = outputs.last_hidden_state.to(head.weight.device)  # devices differ if device_map splits the model
        given = {name: labels.to(hidden.device) for name, labels in given.items() if labels is not None}
        labels = shifted_labels(given) if given else None
        return _call(qtarget, hidden, labels, head, _aux_loss(self, outputs, kwargs))

    model.forward = types.MethodType(forward, model)


@torch.compiler.disable()  # the data decides on rows, tiles and kernels, which would recompile the model at each step
def _call(reader: Reader, *given: Any) -> Any:
    return reader(*given)


def _aux_loss(model: Any, outputs: Any, kwargs: dict) -> Tensor | None:
    """The load-balancing loss of a mixture of experts, if the caller asked for router logits.

    None where no layer has experts, as in the dense members of such families: there is nothing to balance.
    """
    routed = [x for x in getattr(outputs, "router_logits", None) or () if x is not None]
    if not kwargs.get("output_router_logits") or not routed:
        return None
    config = model.config.get_text_config()
    experts, chosen = (
        next((value for name in names if (value := getattr(config, name, None))), None) for names in (EXPERTS, CHOSEN)
    )
    if experts is None or chosen is None:
        raise ValueError(
            f"{type(model).__name__} has experts, and its configuration names neither their number nor how many a "
            "token uses: set router_aux_loss_coef to 0, or train it with TRL's SFTTrainer."
        )
    return balancing_loss(tuple(routed), experts, chosen, kwargs.get("attention_mask"))


def forget_experts(model: PreTrainedModel) -> None:
    """Turn off the router logits of a model without experts in a family with some: its own forward would fail."""
    model.config.get_text_config().output_router_logits = False


@torch.no_grad()
def read_teacher(model: Any, *parts: dict[str, Any]) -> ProjectedLogits:
    """The hidden states of a frozen model, (B, T, D), with its head, instead of logits.

    The inputs may come in several parts, which the model reads one after another; their rows are joined.
    """
    kept: list[ProjectedLogits] = []

    def keep(hidden: Tensor, labels: Tensor | None, head: Head, aux_loss: Tensor | None) -> None:
        kept.append(ProjectedLogits(hidden, head.weight, head.bias, head.scale, head.softcap))

    for inputs in parts:
        model(**inputs, qtarget=keep)
    return kept[0] if len(kept) == 1 else replace(kept[-1], hidden=torch.cat([part.hidden for part in kept]))
