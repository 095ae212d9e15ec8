"""The specification: every loss written out over the whole vocabulary in float64, and the target any loss implies.

This module is slow and dense on purpose: kernels are tested against it, and it is tested against each paper's formula.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .target import Residual, Target, Tokens


IGNORE = -100  # the label of a token that is not trained on, as in torch's cross entropy


def pool(residual: Residual, log_p: Tensor, log_q: Any) -> Tensor:  # (N, V), (N, V) -> (N, V)
    """log pi~, with `pi~(v) ~ p(v)^a * pi_T(v)^b` over the tokens that both models can produce.

    A factor with exponent zero is left out and not multiplied, since 0 * -inf is NaN.
    """
    possible = log_p > -torch.inf
    logits = torch.zeros_like(log_p)
    if residual.student:
        logits = logits + residual.student * log_p
    if residual.teacher:
        possible = possible & (log_q > -torch.inf)
        logits = logits + residual.teacher * log_q
    return logits.masked_fill(~possible, -torch.inf).log_softmax(-1)


def _expect(log_weight: Tensor, x: Tensor) -> Tensor:  # (N, V), (N, V) -> (N,)
    """E_weight[x] over each row; tokens of weight zero contribute nothing, even where x is infinite."""
    return (log_weight.exp() * x.masked_fill(log_weight == -torch.inf, 0)).sum(-1)


@dataclass
class DenseStatistics:
    """The vocabulary statistics of `Tokens`, from dense log-probabilities."""

    log_p: Tensor  # (N, V)
    labels: Tensor  # (N,)
    residual: Residual
    log_q: Any  # (N, V) the teacher's, or None

    @cached_property
    def log_pool(self) -> Tensor:
        return pool(self.residual, self.log_p, self.log_q)

    @cached_property
    def entropy(self) -> Tensor:
        return -_expect(self.log_p, self.log_p).clamp(max=0)

    @cached_property
    def collision(self) -> Tensor:
        return (2 * self.log_p).exp().sum(-1)

    @cached_property
    def residual_log_p_y(self) -> Tensor:
        return self.log_pool.gather(-1, self.labels[:, None]).squeeze(-1)

    @cached_property
    def residual_nll(self) -> Tensor:
        return -_expect(self.log_pool, self.log_p)

    @cached_property
    def residual_kl(self) -> Tensor:
        return self.residual_nll + _expect(self.log_pool, self.log_pool)

    @cached_property
    def teacher_log_p_y(self) -> Tensor:
        return self.log_q.gather(-1, self.labels[:, None]).squeeze(-1)

    @cached_property
    def teacher_mass(self) -> Tensor:
        q, q_y = self.log_q.exp(), self.teacher_log_p_y.exp()
        return (q * (q < q_y[:, None])).sum(-1) + q_y

    def top_evenness(self, k: int) -> Tensor:
        k = min(k, self.log_p.shape[-1])
        top = self.log_p.topk(k).values.log_softmax(-1)
        return (-_expect(top, top) / math.log(max(k, 2))).clamp(0, 1)


def reference_loss(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,) IGNORE where there is nothing to learn
    target: Target,
    teacher_logits: Tensor | None = None,  # (N, V_T)
    *,
    reference_log_p_y: Tensor | None = None,  # (N,)
    reference_mass: Tensor | None = None,  # (N,)
    token_weight: Tensor | None = None,  # (N,)
    trust: Tensor | None = None,  # (N,) NaN where the target's own is meant
    trajectory: Tensor | None = None,  # (N,) ids; None: all tokens are one trajectory
) -> Tensor:  # ()
    """Sum over labelled tokens of the loss, in float64; autograd supplies the gradient `s * (p - Q)`.

    The value is the published one (`Target.value`), else that of `s * CE(Q, p)`; the gradient is that of
    `s * CE(stopgrad[Q], p)` always. A teacher with other columns than the student is compared over the common first
    ones, renormalised.
    """
    columns = {
        "token_weight": token_weight,
        "trust": trust,
        "reference_log_p_y": reference_log_p_y,
        "reference_mass": reference_mass,
        "trajectory": trajectory,
    }
    columns = {name: column for name, column in columns.items() if column is not None}
    target.require(teacher=teacher_logits is not None, columns=columns)
    keep = labels != IGNORE
    log_p = logits[keep].double().log_softmax(-1)
    with torch.no_grad():
        taught = None if teacher_logits is None else teacher_logits[keep]
        columns = {name: column[keep] for name, column in columns.items()}
        tokens = dense_tokens(log_p, labels[keep], target, taught, **columns)
        weights = target.weights(tokens)
        published = target.token_loss(weights, tokens).sum()
        target_mass = _target_mass(target, weights, tokens)  # s * Q
    surrogate = -(target_mass * log_p.masked_fill(target_mass == 0, 0)).sum()
    return surrogate + (published - surrogate).detach()


def dense_tokens(
    log_p: Tensor,  # (N, V) float64
    labels: Tensor,  # (N,) none ignored
    target: Target,
    teacher_logits: Tensor | None = None,  # (N, V_T)
    **columns: Tensor,  # (N,) each, under the names of `Tokens.of`
) -> Tokens:
    """The `Tokens` that the rules of `target` read, with every statistic computed from dense log-probabilities."""
    log_q = None
    if teacher_logits is not None:
        common = min(log_p.shape[-1], teacher_logits.shape[-1])
        log_q = torch.full_like(log_p, -torch.inf)
        log_q[:, :common] = teacher_logits[:, :common].double().log_softmax(-1)
    if "trajectory" in columns:
        columns["trajectory"] = columns["trajectory"].unique(return_inverse=True)[1]
    log_p_y = log_p.gather(-1, labels[:, None]).squeeze(-1)
    return Tokens.of(log_p_y, DenseStatistics(log_p, labels, target.residual, log_q), labels, **columns)


PROBED = 12  # tokens on which a target's rules are tried


@functools.lru_cache(maxsize=64)
def require_tokenwise(target: Target) -> None:
    """Raise a ValueError if a rule's number for a token depends on the tokens that are evaluated beside it.

    The kernels hand rules one block of tokens at a time, so the loss of such a target would depend on the block size.
    A target with `whole_batch` gets all tokens at once and may look at all of them.
    """
    if target.whole_batch:
        return
    generator = torch.Generator().manual_seed(0)
    log_p, taught = (torch.randn(PROBED, 32, generator=generator).double().log_softmax(-1) for _ in range(2))
    numbers = torch.rand(3, PROBED, generator=generator).double().clamp(0.01, 0.99)
    columns = dict(zip(("token_weight", "reference_log_p_y", "reference_mass"), numbers, strict=True))
    columns["reference_log_p_y"] = columns["reference_log_p_y"].log()
    labels = torch.randint(32, (PROBED,), generator=generator)

    def weights(rows: Tensor) -> Tensor:  # (5, n)
        given = {name: column[rows] for name, column in columns.items()}
        tokens = dense_tokens(log_p[rows], labels[rows], target, taught[rows], **given)
        found = target.weights(tokens)
        return torch.stack([*found, target.token_loss(found, tokens)])

    order = torch.randperm(PROBED, generator=generator)
    try:
        together = weights(torch.arange(PROBED))
        apart = torch.cat([weights(part) for part in order.split(PROBED // 3)], dim=-1)
    except Exception:  # the made-up tokens do not suit this rule: it runs, or fails, on the real ones
        return
    if not torch.allclose(together[:, order], apart, rtol=1e-6, atol=1e-12, equal_nan=True):
        raise ValueError(
            "A rule of this target (trust, scale, residual_weight or value) gives a token another number when other "
            "tokens are evaluated beside it, and rules see blocks of tokens whose size depends on the device: compute "
            "each token's number from that token alone, or set whole_batch=True, which passes all tokens at once."
        )


def _target_mass(target: Target, weights, tokens: Tokens) -> Tensor:  # (N, V)
    """s * Q up to a multiple of p, which changes no gradient."""
    mass = torch.zeros_like(tokens.rows.log_p)
    if target.residual.is_student:
        # the residual is p itself and adds no gradient: w_y * (p - delta_y) is the whole gradient
        return mass.scatter_(-1, tokens.labels[:, None], weights.label[:, None])
    mass += weights.residual[:, None] * tokens.rows.log_pool.exp()
    return mass.scatter_add_(-1, tokens.labels[:, None], weights.label[:, None])


class InducedTarget(NamedTuple):
    """The distribution that a loss pulls the model towards."""

    target: Tensor  # (N, V) Q = p - dL/dz, rows sum to one; a signed measure where some entry is negative
    scale: Tensor  # (N,) smallest s for which Q_s = p - dL/dz / s is a proper distribution; 0 for a zero gradient
    signed: Tensor  # (N,) bool: Q itself (s = 1) is signed, so the loss is no cross entropy to a distribution


def induced_target(
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
) -> InducedTarget:
    """The target distribution that any loss implies, `Q = p - dL/dz` (arXiv 2606.11189).

    `loss_fn(logits, labels)` returns a scalar, or one value per token; values are summed. Q is defined up to a scale:
    `Q_s = p - dL/dz / s` gives the same gradient `s * (p - Q_s)`, and is proper when `s >= max_v (dL/dz_v) / p_v`.

    Raises:
        ValueError: a gradient whose rows do not sum to zero; the loss then depends on a constant added to the logits,
            and no target distribution explains it.

    Example:
        >>> Q, scale, signed = induced_target(lambda z, y: torch.nn.functional.cross_entropy(z, y), z, y)
    """
    z = logits.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_fn(z, labels).sum(), z)
    if not gradient.isfinite().all():
        raise ValueError("The gradient of the loss is not finite, so it implies no target distribution.")
    size = gradient.abs().sum(-1)
    if (gradient.sum(-1).abs() > 1e-6 * size.clamp(min=1e-6)).any():
        raise ValueError(
            "The loss changes when a constant is added to all logits of a token, so it implies no target: "
            "compute it from log-probabilities, for instance logits.log_softmax(-1)."
        )
    p = z.detach().softmax(-1)
    ratio = torch.where(gradient == 0, gradient, gradient / p)
    scale = ratio.amax(-1).clamp(min=0)
    return InducedTarget(p - gradient, scale, scale > 1 + 1e-9)
