"""The seam with the model: a forward that stops at the last hidden states and hands them on with the head.

`model(**inputs, qtarget=reader)` runs the backbone and returns `reader(hidden, labels, head, aux_loss)`; without the
keyword the forward is the model's own, so generation and saving see nothing of it. This module holds the only
assignment to `model.forward` in the package. The forward is called through whatever wraps the model (DDP, FSDP,
DeepSpeed, autocast), and backbone and head are looked up in each call, because PEFT and FSDP replace them.

    DDP, FSDP1   the wrapper's forward is entered as ever; gradients of the head flow through its parameter
    FSDP2        a head that is still sharded is a DTensor: gathered once, before the loss, and its gradient reduced
    ZeRO-3       heads are gathered around the loss (`gathered`)
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

from ..compat import backbone, balancing_loss
from ..loss.products import Head
from ..loss.teacher import ProjectedLogits
from ..theory.reference import IGNORE
from .head import read_head


Reader = Callable[[Tensor, Tensor, Head, Tensor | None], Any]


def install(model: PreTrainedModel) -> None:
    """Give `model` the forward described above. Call it on the base model of a PEFT model, before any wrapping."""
    own_forward = model.forward
    backbone(model)  # refused here rather than in the first step

    # the original's signature, since transformers reads it to decide what a model may be given
    @functools.wraps(type(model).forward)
    def forward(self, *args, qtarget: Reader | None = None, **kwargs):
        if qtarget is None:
            return own_forward(*args, **kwargs)
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        kwargs.pop("num_items_in_batch", None)
        outputs = backbone(self)(*args, **kwargs)
        head = read_head(self)
        hidden = outputs.last_hidden_state.to(head.weight.device)  # apart only where device_map splits the model
        if shifted is None and labels is not None:
            shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
        shifted = None if shifted is None else shifted.to(hidden.device)
        return _read(qtarget, hidden, shifted, head, _aux_loss(self, outputs, kwargs))

    model.forward = types.MethodType(forward, model)


@torch.compiler.disable()  # rows, tiles and kernels are chosen by the data, which a compiled model need not follow
def _read(reader: Reader, *given: Any) -> Any:
    return reader(*given)


def _aux_loss(model: PreTrainedModel, outputs: Any, kwargs: dict) -> Tensor | None:
    """The load-balancing loss of a mixture of experts, where the caller asked for router logits."""
    if not kwargs.get("output_router_logits"):
        return None
    config = model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    return balancing_loss(outputs.router_logits, experts, config.num_experts_per_tok, kwargs.get("attention_mask"))


@torch.no_grad()
def read_teacher(model: Any, *parts: dict[str, Any]) -> ProjectedLogits:
    """A frozen model's hidden states on these inputs, (B, T, D), with its head: logits are never made here.

    Of several parts, which are read one after another, the rows are joined.
    """
    kept: list[ProjectedLogits] = []

    def keep(hidden: Tensor, labels: Tensor | None, head: Head, aux_loss: Tensor | None) -> None:
        kept.append(ProjectedLogits(hidden, head.weight, head.bias, head.scale, head.softcap))

    for inputs in parts:
        model(**inputs, qtarget=keep)
    return kept[0] if len(kept) == 1 else replace(kept[-1], hidden=torch.cat([part.hidden for part in kept]))
