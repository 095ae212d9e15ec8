"""Row kernels in torch: statistics of a block of logits, then its gradient written over it.

    rows(z, labels, residual, teacher)   the statistics that `Tokens` reads, each (r,); z is shifted in place
    .write_gradient(w_y, w_r, out)       writes dloss/dz into out, which may be z; returns its L1 norm (r,), or None
                                         where the norm follows from p_y

    dloss/dz = (w_y + w_r) * p - w_y * delta_y - w_r * pi~

A block is a few rows, so that every pass but the first finds the block in the CPU's cache. Everything is computed on
`z - max(z)`: losses do not depend on the shift, and small differences keep their digits. r: rows, V: columns, K: ids
of a top-K teacher.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..theory.target import Residual
from .products import precise
from .scratch import scratch
from .sparse import SparsePool, SparseStatistics
from .teacher import DenseTile, TeacherTile, TopKLogits


BLOCK_BYTES = 2**22  # of one block of logits: two or three blocks fit one core's share of the last-level cache
BELOW_ALL = -1e30  # replaces -inf in products with a factor 0, which would be NaN


def block_rows(vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """The number of rows to pass to `rows` at once."""
    return max(1, BLOCK_BYTES // (vocab_size * dtype.itemsize)) if device.type == "cpu" else 2**30


def rows(
    z: Tensor,  # (r, V) logits before the softcap, overwritten
    labels: Tensor,  # (r,)
    residual: Residual,
    teacher: TeacherTile | None = None,
    softcap: float | None = None,
) -> StudentRows:
    """Statistics of r rows and their gradient; the logits of student and of a dense teacher are capped in place."""
    z = cap_(z, softcap)
    if isinstance(teacher, TopKLogits) and not residual.is_student:
        return SparseRows(z, labels, softcap, teacher, residual)
    taught = cap_(teacher.logits, teacher.softcap) if isinstance(teacher, DenseTile) else None
    if residual.is_student:
        return StudentRows(z, labels, softcap, taught)
    return PooledRows(z, labels, softcap, taught, residual)


def cap_(z: Tensor, softcap: float | None) -> Tensor:
    """`softcap * tanh(z / softcap)`, in place; a masked column (-inf) stays -inf."""
    if softcap is None:
        return z
    masked = z == -torch.inf
    return z.div_(softcap).tanh_().mul_(softcap).masked_fill_(masked, -torch.inf)


def pick(x: Tensor, ids: Tensor) -> Tensor:  # (r, V), (r,) -> (r,)
    return x.gather(-1, ids[:, None]).squeeze(-1)


def evenness(top: Tensor) -> Tensor:  # (r, k) -> (r,)
    """Entropy of the distribution over these logits, over its maximum log k."""
    log_p = top.log_softmax(-1)
    return (-(log_p.exp() * log_p).sum(-1) / math.log(max(top.shape[-1], 2))).clamp(0, 1)


def log_prob(logits: Tensor, labels: Tensor) -> Tensor:  # (r, V), (r,) -> (r,)
    return pick(logits, labels) - logits.logsumexp(-1)


def rank_mass(logits: Tensor, labels: Tensor) -> Tensor:  # (r, V), (r,) -> (r,)
    """Probability of the label and of all tokens ranked below it."""
    q = logits.softmax(-1)
    q_y = pick(q, labels)
    return q.mul_(q < q_y[:, None]).sum(-1) + q_y


class RowStatistics:
    """Statistics that rows of every kind derive in the same way from their sums and from a dense teacher's logits."""

    labels: Tensor  # (r,)
    teacher: Any  # (r, V) logits of a dense teacher, or None
    sum: Tensor  # (r,) sum_v e(v) with e = exp(z - max z)
    log_sum: Tensor  # (r,) its logarithm
    dot: Tensor  # (r,) sum_v e(v) (z(v) - max z)

    @cached_property
    def entropy(self) -> Tensor:
        return (self.log_sum - self.dot / self.sum).clamp(min=0)

    @property
    def teacher_log_p_y(self) -> Tensor:
        return log_prob(self.teacher, self.labels)

    @property
    def teacher_mass(self) -> Tensor:
        return rank_mass(self.teacher, self.labels)


class StudentRows(RowStatistics):
    """Rows whose residual is the student: the residual term has no gradient, and the rest is `w_y * (p - delta_y)`."""

    def __init__(self, z: Tensor, labels: Tensor, softcap: float | None, teacher: Tensor | None = None):
        self.z, self.labels, self.softcap, self.teacher = z, labels, softcap, teacher
        self.max = z.amax(-1)
        self.is_top1 = pick(z, labels) == self.max
        z.sub_(self.max[:, None])
        self.e = torch.exp(z, out=scratch("exponentials", z.shape, z))  # p * sum
        self.sum, self.dot = self._moments()
        self.impossible = None
        if self.dot.isnan().any():  # 0 * -inf: a column is masked
            self.impossible = z == -torch.inf
            z.masked_fill_(self.impossible, BELOW_ALL)
            self.sum, self.dot = self._moments()
        self.log_sum = self.sum.log()
        self.log_p_y = pick(z, labels) - self.log_sum

    def _moments(self) -> tuple[Tensor, Tensor]:
        """sum_v e(v) and sum_v e(v) z(v)."""
        return self.e.sum(-1), torch.linalg.vecdot(self.e, self.z)

    @cached_property
    def collision(self) -> Tensor:
        return torch.linalg.vecdot(self.e, self.e) / self.sum**2

    def top_evenness(self, k: int) -> Tensor:
        return evenness(self.z.topk(min(k, self.z.shape[-1])).values)

    @property
    def residual_log_p_y(self) -> Tensor:
        return self.log_p_y

    @property
    def residual_nll(self) -> Tensor:
        return self.entropy

    @property
    def residual_kl(self) -> Tensor:
        return torch.zeros_like(self.log_p_y)

    def write_gradient(self, label_weight: Tensor, residual_weight: Tensor, out: Tensor) -> Tensor | None:
        slope = self._slope()
        torch.mul(self.e, (label_weight / self.sum)[:, None], out=self.z)
        self._subtract_label(label_weight)
        self._finish(slope, out)
        return None

    def _finish(self, slope: Tensor | None, out: Tensor) -> None:
        if slope is not None:
            self.z.mul_(slope)
        if out.data_ptr() != self.z.data_ptr():
            out.copy_(self.z)

    def _slope(self) -> Tensor | None:
        """d softcap(x) / dx from the capped logits, computed before the gradient overwrites them."""
        if self.softcap is None:
            return None
        capped = (self.z + self.max[:, None]).clamp_(min=-self.softcap)  # masked columns lie below
        return capped.div_(self.softcap).square_().neg_().add_(1)

    def _subtract_label(self, label_weight: Tensor) -> None:
        self.z.scatter_add_(-1, self.labels[:, None], -label_weight[:, None])


class PooledRows(StudentRows):
    """Rows whose residual is a pool over the whole vocabulary, with a dense teacher or without one."""

    def __init__(self, z: Tensor, labels: Tensor, softcap: float | None, teacher: Tensor | None, residual: Residual):
        super().__init__(z, labels, softcap, teacher)
        pool = self._pool_logits(residual)
        self.pool = pool.sub_(pool.amax(-1, keepdim=True)).exp_()  # pi~ * pool_sum
        self.pool_sum = self.pool.sum(-1)

    def _pool_logits(self, residual: Residual) -> Tensor:
        """a * z + b * t; a term with exponent zero is left out, since 0 * -inf is NaN."""
        pool = scratch("pool", self.z.shape, self.z)
        if residual.teacher == 0:
            pool.zero_()
        else:
            torch.mul(self.teacher, residual.teacher, out=pool)
        if residual.teacher < 0:
            pool.masked_fill_(self.teacher == -torch.inf, -torch.inf)
        if residual.student != 0:
            pool.add_(self.z, alpha=residual.student)
        return pool if self.impossible is None else pool.masked_fill_(self.impossible, -torch.inf)

    @cached_property
    def residual_log_p_y(self) -> Tensor:
        return (pick(self.pool, self.labels) / self.pool_sum).log()

    @cached_property
    def residual_nll(self) -> Tensor:
        return self.log_sum - torch.linalg.vecdot(self.pool, self.z) / self.pool_sum

    @cached_property
    def residual_kl(self) -> Tensor:
        negentropy = torch.special.xlogy(self.pool, self.pool).sum(-1) / self.pool_sum - self.pool_sum.log()
        return (self.residual_nll + negentropy).clamp(min=0)

    def write_gradient(self, label_weight: Tensor, residual_weight: Tensor, out: Tensor) -> Tensor:
        slope = self._slope()
        torch.mul(self.e, ((label_weight + residual_weight) / self.sum)[:, None], out=self.z)
        self.z.addcmul_(self.pool, (-residual_weight / self.pool_sum)[:, None])
        self._subtract_label(label_weight)
        norm = torch.abs(self.z, out=self.e).sum(-1)
        self._finish(slope, out)
        return norm


class SparseRows(SparseStatistics, StudentRows):
    """Rows whose teacher is known at K ids and has the student's shape elsewhere: `SparsePool` computes the pool."""

    def __init__(self, z: Tensor, labels: Tensor, softcap: float | None, teacher: TopKLogits, residual: Residual):
        self.ids, self.known = teacher.ids, teacher.log_probs > -torch.inf
        super().__init__(z, labels, softcap)
        log_p = precise(z.gather(-1, self.ids)) - self.log_sum[:, None]
        tail_p = self.tail_sum / self.sum
        tail_p_log_p = self.tail_dot / self.sum - tail_p * self.log_sum
        self.sparse = SparsePool(teacher, log_p, tail_p, tail_p_log_p, labels, residual)

    def _moments(self) -> tuple[Tensor, Tensor]:
        """The moments, the tail summed apart: as a difference it would lose its digits where the student is sure."""
        e, z = self.e.gather(-1, self.ids), self.z.gather(-1, self.ids)
        self.e.scatter_(-1, self.ids, 0)
        self.tail_sum, self.tail_dot = super()._moments()
        self.e.scatter_(-1, self.ids, e)
        e = e * self.known  # after the exponentials are back: padding repeats an id
        return self.tail_sum + e.sum(-1), self.tail_dot + (e * z).sum(-1)

    def write_gradient(self, label_weight: Tensor, residual_weight: Tensor, out: Tensor) -> Tensor:
        slope = self._slope()
        gradient = self.sparse.gradient(label_weight, residual_weight, self.log_p_y)
        torch.mul(self.e, (gradient.tail / self.sum).to(self.e)[:, None], out=self.z)
        self.z.scatter_(-1, self.ids, gradient.known.to(self.z))
        self._subtract_label(gradient.label.to(self.z))
        self._finish(slope, out)
        return gradient.norm
