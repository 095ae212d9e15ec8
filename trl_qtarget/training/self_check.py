"""The check of the first training step: loss and gradients of a few tokens are those of the float64 specification.

The loss of these tokens is computed twice from the model's own hidden states and head, by the kernels and densely by
`theory.reference`. Differences are compared with the size of what is compared. An absolute tolerance would let a loss
that is always zero pass wherever labels are so improbable that the true loss is small.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..loss.fused import QTargetOutput
from ..loss.per_token import PerToken
from ..loss.products import Head
from ..loss.teacher import ProjectedLogits, TeacherLogits, TopKLogits
from ..model.check import CHECKED_TOKENS
from ..model.head import dense_logits, logits_of
from ..theory.reference import IGNORE, dense_tokens, reference_loss
from ..theory.target import Target
from .kernels import Kernels


TOLERANCE = {False: 0.02, True: 0.3}  # relative; True: in half precision, which moves p by as much where logits are 30
NATS = {False: 1e-4, True: 0.05}  # of the reported value, which may be a difference of two larger numbers (gem)
AGREEING = 0.9  # share of tokens: in half precision a few may fall on the other side of a threshold (profit, psft)


def compare_with_reference(
    kernels: Kernels,
    target: Target,
    hidden: Tensor,  # (B, T, D)
    head: Head,
    tokens: PerToken,  # (B, T)
    teacher: TeacherLogits | None,
    out: QTargetOutput,
) -> None:
    """Raise a RuntimeError unless loss and gradients of a few tokens are the specified ones.

    `out` is the loss of the whole batch. Its value for the few tokens must be the one that they get alone, unless the
    target weighs the whole batch together.
    """
    tokens = tokens.flatten()
    rows = (tokens.labels != IGNORE).nonzero().squeeze(-1)[:CHECKED_TOKENS]
    if not len(rows):
        return
    few, tokens = hidden.detach().flatten(0, 1)[rows], tokens.take(rows)
    taught = None if teacher is None else teacher.flatten().take(rows)
    half = any(x.dtype in (torch.float16, torch.bfloat16) for x in (few, head.weight))
    half = half or torch.is_autocast_enabled(few.device.type)
    with torch.enable_grad():
        loss, gradients = _computed(kernels, target, few, head, tokens, taught)
        specified, wanted = _specified(target, few, kernels.compared(head), tokens, taught)
    _require(loss, specified, half, "loss", NATS[half])
    if not target.whole_batch:
        _require(out.token_loss.flatten()[rows], loss, half, "loss within the batch", NATS[half])
    for name, gradient in gradients.items():
        _require(gradient, wanted[name], half, f"gradient of the {name}")


def _computed(
    kernels: Kernels, target: Target, few: Tensor, head: Head, tokens: PerToken, teacher: TeacherLogits | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of the tokens by the kernels, (n,), and gradients: that of hidden, (n, D), and `_probe` of the head's."""
    hidden, weight = few.requires_grad_(), head.weight.detach().requires_grad_(head.weight.requires_grad)
    bias = None if head.bias is None else head.bias.detach()
    fused = kernels.loss(hidden, replace(head, weight=weight, bias=bias), target, tokens, teacher)
    if not weight.requires_grad:
        return fused.token_loss, {"hidden states": torch.autograd.grad(fused.loss, hidden)[0]}
    of_hidden, of_weight = torch.autograd.grad(fused.loss, (hidden, weight))
    columns = len(kernels.compared(head).weight)
    return fused.token_loss, {
        "hidden states": of_hidden,
        "head": (of_weight[:columns].float() @ _probe(few).to(of_weight.device))[:, None],
    }


def _specified(
    target: Target, few: Tensor, head: Head, tokens: PerToken, teacher: TeacherLogits | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and gradients of the same tokens in float64, densely, from the model's logits."""
    weight = head.weight.detach()
    with torch.no_grad():
        z = _exact(torch.nn.functional.linear(few.to(weight.dtype), weight, head.bias).float())
    logits = logits_of(z.requires_grad_(), head)
    taught = None
    if isinstance(teacher, TopKLogits):
        taught = TopKLogits(_exact(teacher.ids), _exact(teacher.log_probs)).dense(logits.detach())
    elif isinstance(teacher, ProjectedLogits):
        taught = _exact(dense_logits(teacher.hidden, teacher.head))
    columns = {name: _exact(column) for name, column in tokens.columns().items()}
    labels = columns.pop("labels")
    loss = reference_loss(logits, labels, target, taught, **columns)
    (gradient,) = torch.autograd.grad(loss, z)
    with torch.no_grad():
        seen = dense_tokens(logits.double().log_softmax(-1), labels, target, taught, **columns)
        values = target.token_loss(target.weights(seen), seen)
        return values, {
            "hidden states": gradient.to(weight) @ weight,
            "head": (gradient.to(few.device).t() @ (few.float() @ _probe(few)))[:, None],
        }


def _exact(x: Tensor) -> Tensor:
    """Move `x` to the CPU if its device has no float64, as Apple's do not."""
    return x.cpu() if x.device.type == "mps" else x


def _probe(few: Tensor) -> Tensor:  # (D,)
    """A fixed random vector: the gradient of the head, (V, D), is compared in its products with this vector."""
    vector = torch.randn(few.shape[-1], generator=torch.Generator().manual_seed(0))
    return vector.to(few.device)


def _require(got: Tensor, wanted: Tensor, half: bool, name: str, slack: float = 0.0) -> None:
    """Raise a RuntimeError unless most rows, and all together, agree up to the tolerance; `slack` is absolute."""
    got, wanted = (_exact(x.detach()).double().reshape(len(x), -1) for x in (got, wanted))
    error, size = (got - wanted).norm(dim=-1), wanted.norm(dim=-1)
    allowed = TOLERANCE[half] * (size + 0.01 * size.mean()) + slack
    share = (error <= allowed).double().mean()
    if share < AGREEING or error.norm() > TOLERANCE[half] * size.norm() + slack * len(size) ** 0.5:
        raise RuntimeError(
            f"The fused loss differs from its specification on this model: the {name} has a mean size of "
            f"{got.norm(dim=-1).mean():.4g} a token where {size.mean():.4g} is right. Please report it with the "
            "model's name; qtarget_self_check=False trains on regardless."
        )
