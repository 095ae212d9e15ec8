"""The check that hidden states times head are a model's own logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .forward import read_teacher
from .head import dense_logits, gathered


CHECKED_TOKENS = 64
NATS = {True: 0.25, False: 0.01}  # allowed mean difference by `half`: roundings of logits of 30 differ by 0.1


@torch.no_grad()
def head_mismatch(model: Any, input_ids: Tensor, half: bool) -> str | None:
    """Compare hidden states times head with the model's own forward; None, or a clause that says how they differ.

    A model may transform, cap or scale its logits in a way that no configuration names, and an adapter may change a
    head that the look-up of the head does not see. A loss computed from hidden states would then be the loss of
    another model.
    """
    few = input_ids[:1, :CHECKED_TOKENS]
    own = model(input_ids=few).logits.float().log_softmax(-1)
    read = read_teacher(model, {"input_ids": few})
    with gathered(read.weight, read.bias):
        ours = dense_logits(read.hidden, read.head).log_softmax(-1)
        half = half or read.weight.dtype in (torch.float16, torch.bfloat16)
    top = own.argmax(-1, keepdim=True)
    error = (own - ours).gather(-1, top).abs().mean()
    if error <= NATS[half]:
        return None
    return f"computed from hidden states and head, its log-probabilities are off by {error:.3f} nats"
