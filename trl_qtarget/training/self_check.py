"""Two checks of the first training step, on a few tokens, before the optimizer uses a wrong number.

`check_head`: hidden states times head are the model's own logits. `compare_with_reference`: the fused loss is the one
of the float64 specification.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..loss.fused import QTargetOutput
from ..loss.per_token import PerToken
from ..loss.products import Head
from ..loss.teacher import TeacherLogits, TopKLogits
from ..model.forward import read_teacher
from ..model.head import dense_logits, gathered
from ..theory.reference import IGNORE, dense_tokens
from ..theory.target import Target


SELF_CHECK_TOKENS = 64
AGREEING = 0.9  # share of the tokens: in half precision a few may fall on the other side of a threshold (profit, psft)


@torch.no_grad()
def check_head(model: Any, input_ids: Tensor, half: bool) -> None:
    """Raise a RuntimeError unless hidden states times head are the logits of the model's own forward.

    A model may transform, cap or scale its logits in a way that no configuration names; a loss computed from hidden
    states would then be the loss of another model. In half precision, two ways to round logits of 30 differ by a tenth
    of a nat, so the tolerance is larger there.
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


@torch.no_grad()
def compare_with_reference(
    target: Target,
    hidden: Tensor,  # (B, T, D)
    head: Head,
    tokens: PerToken,  # (B, T)
    teacher: TeacherLogits | None,
    out: QTargetOutput,
) -> None:
    """Raise a RuntimeError if the fused loss of a few tokens is not the one of the float64 specification."""
    tokens = tokens.flatten()
    rows = (tokens.labels != IGNORE).nonzero().squeeze(-1)[:SELF_CHECK_TOKENS]
    if not len(rows):
        return
    logits = dense_logits(hidden.flatten(0, 1)[rows], head)
    taught = None
    if teacher is not None:
        few = teacher.flatten().take(rows)
        taught = few.dense(logits) if isinstance(few, TopKLogits) else dense_logits(few.hidden, few.head)
    columns = tokens.take(rows).columns()
    seen = dense_tokens(logits.double().log_softmax(-1), columns.pop("labels"), target, taught, **columns)
    expected = target.token_loss(target.weights(seen), seen)
    got = out.token_loss.flatten()[rows]
    close = (got - expected).abs() <= 0.05 * expected.abs() + 0.05
    if close.float().mean() < AGREEING:
        raise RuntimeError(
            f"The fused loss differs from its specification on this model: {got.mean():.4f} against "
            f"{expected.mean():.4f} nats a token. Please report it with the model's name; "
            "qtarget_self_check=False trains on regardless."
        )
