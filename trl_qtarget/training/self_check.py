"""Checks of the first training step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..model.forward import read_teacher
from ..model.head import dense_logits, gathered


SELF_CHECK_TOKENS = 64


@torch.no_grad()
def check_head(model: Any, input_ids: Tensor, half: bool) -> None:
    """Raise unless hidden states times head are the logits of the model's own forward, on a few tokens.

    A model may transform, cap or scale its logits in a way that no configuration names; any loss computed from its
    hidden states would then be a loss of another model. In half precision, two ways to round logits of 30 differ by a
    tenth of a nat already.
    """
    few = input_ids[:1, :SELF_CHECK_TOKENS]
    own = model(input_ids=few).logits.float().log_softmax(-1)
    read = read_teacher(model, {"input_ids": few})
    with gathered(read.weight, read.bias):
        ours = dense_logits(read.hidden, read.head).log_softmax(-1)
        half = half or read.weight.dtype in (torch.float16, torch.bfloat16)
    top = own.argmax(-1, keepdim=True)
    error = (own - ours).gather(-1, top).abs().mean()
    if error > (0.25 if half else 0.01):
        raise RuntimeError(
            f"{type(model).__name__} does something to its logits that trl_qtarget does not know of: computed from "
            f"hidden states and head, its log-probabilities are off by {error:.3f} nats. Train it with TRL's "
            "SFTTrainer, and please report the model's name."
        )
