"""The pool of a teacher known at K ids: K numbers a row in float64, and one factor for all other columns.

Outside its ids the teacher has the student's shape, `pi_T(v) = tau_T * p(v) / tau_p` with the tail masses tau. As the
exponents sum to one, the pool is `c * p` there, with one number c per row: the loss needs neither teacher logits nor a
pool of width V.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..theory.target import Residual
from .products import precise
from .teacher import TopKLogits


IMPOSSIBLE = -1e29  # lower log-probabilities are those of masked columns


class SparseGradient(NamedTuple):
    """dloss/dz of n rows: `tail * p - label * delta_y` outside the ids, `known` at them; in the type of `precise`."""

    tail: Tensor  # (n,)
    label: Tensor  # (n,) zero if y is among the ids
    known: Tensor  # (n, K)
    norm: Tensor  # (n,) L1


class SparsePool:
    """pi~ of n rows, from the probabilities of student and teacher at the known ids and of the tail as a whole.

    The teacher comes from `TopKLogits.without_padding`: an entry of -inf repeats the row's most probable id and counts
    for nothing.
    """

    def __init__(
        self,
        teacher: TopKLogits,
        log_p: Tensor,  # (n, K) in the type of `precise`, the student's
        tail_p: Tensor,  # (n,) tau_p, the student's mass outside the ids: a sum, as 1 - sum loses digits
        tail_p_log_p: Tensor,  # (n,) sum of p log p outside the ids
        labels: Tensor,  # (n,)
        residual: Residual,
    ):
        self.ids, self.log_p, self.labels = teacher.ids, log_p, labels
        self.log_q = log_q = precise(teacher.log_probs)
        self.padded, self.best = log_q == -torch.inf, log_q.argmax(-1, keepdim=True)
        self.tail_p, self.tail_p_log_p = precise(tail_p), precise(tail_p_log_p)
        self.tail_q = -torch.expm1(log_q.logsumexp(-1).clamp(max=0))
        has_tail = (self.tail_p > 0) & (self.tail_q > 0)
        known, tail = residual.teacher * log_q, residual.teacher * self.tail_q.log()
        if residual.student != 0:
            known = known + residual.student * log_p
            tail = tail + residual.student * self.tail_p.log()
        known = known.masked_fill(self.padded | (log_p < IMPOSSIBLE), -torch.inf)
        logs = torch.cat([known, tail.masked_fill(~has_tail, -torch.inf)[:, None]], dim=-1).log_softmax(-1)
        self.pool, self.pool_tail = logs[:, :-1].exp(), logs[:, -1].exp()
        self.factor = torch.where(has_tail, self.pool_tail / self.tail_p, 0)  # c

    def gradient(self, label_weight: Tensor, residual_weight: Tensor, log_p_y: Tensor) -> SparseGradient:
        """The gradient of n rows. Its tail has one sign a row, so the norm needs no pass over the columns."""
        w_y, w_r = precise(label_weight), precise(residual_weight)
        here = self._here()
        known = (w_y + w_r)[:, None] * self.log_p.exp() - w_r[:, None] * self.pool - w_y[:, None] * here
        known = known.where(~self.padded, known.gather(-1, self.best))  # padding repeats the most probable id
        tail, label = w_y + w_r - w_r * self.factor, w_y.where(~here.any(-1), 0)
        p_y = precise(log_p_y).exp().where(~here.any(-1), 0)
        norm = (
            known.abs().masked_fill(self.padded, 0).sum(-1)
            + tail.abs() * (self.tail_p - p_y).clamp(min=0)
            + (tail * p_y - label).abs()
        )
        return SparseGradient(tail, label, known, norm)

    def _here(self) -> Tensor:  # (n, K)
        """Mark the known ids that are the label; padding repeats an id and is left out."""
        return (self.ids == self.labels[:, None]) & ~self.padded

    def _at_label(self, known: Tensor, tail: Tensor) -> Tensor:  # (n, K), (n,) -> (n,)
        """The entry of `known` at the label, or `tail` if the label is none of the ids."""
        here = self._here()
        return torch.where(here.any(-1), known.masked_fill(~here, 0).sum(-1), tail)

    def teacher_log_p_y(self, log_p_y: Tensor) -> Tensor:
        return self._at_label(self.log_q, (self.tail_q / self.tail_p).log() + log_p_y)

    def log_p_y(self, log_p_y: Tensor) -> Tensor:
        return self._at_label(self.pool, self.factor * precise(log_p_y).exp()).log()

    @cached_property
    def nll(self) -> Tensor:
        known = (self.pool * self.log_p.masked_fill(self.pool == 0, 0)).sum(-1)
        return -known - self.factor * self.tail_p_log_p

    @cached_property
    def kl(self) -> Tensor:
        known = torch.special.xlogy(self.pool, self.pool).sum(-1)
        tail = torch.special.xlogy(self.pool_tail, self.factor) + self.factor * self.tail_p_log_p
        return (self.nll + known + tail).clamp(min=0)


class SparseStatistics:
    """The statistics that rows of both backends take from their `SparsePool`."""

    sparse: SparsePool
    log_p_y: Tensor

    @property
    def teacher_log_p_y(self) -> Tensor:
        return self.sparse.teacher_log_p_y(self.log_p_y)

    @property
    def teacher_mass(self) -> Tensor:
        raise ValueError("The rank mass of a label under its teacher needs dense teacher logits, not top-K ones.")

    @property
    def residual_log_p_y(self) -> Tensor:
        return self.sparse.log_p_y(self.log_p_y)

    @property
    def residual_nll(self) -> Tensor:
        return self.sparse.nll

    @property
    def residual_kl(self) -> Tensor:
        return self.sparse.kl
