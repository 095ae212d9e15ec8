"""The distribution of a teacher for every token: dense, or known at a few ids of each token only."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .products import Head


@dataclass(frozen=True)
class ProjectedLogits:
    """A teacher's last hidden states and its head: logits are projected tile by tile and never stored.

    The teacher may have more or fewer columns than the student: the two are compared over the common first columns,
    and the teacher's distribution is normalised over those.
    """

    hidden: Tensor  # (N, D_T) or (..., D_T)
    weight: Tensor  # (V_T, D_T)
    bias: Tensor | None = None  # (V_T,)
    logit_scale: float = 1.0
    softcap: float | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def width(self) -> int:
        """T of (B, T, D_T) hidden states."""
        return self.hidden.shape[1]

    @property
    def head(self) -> Head:
        return Head(self.weight, self.bias, self.logit_scale, self.softcap)

    def flatten(self) -> ProjectedLogits:
        """All tokens in one dimension, (N, D_T)."""
        return replace(self, hidden=self.hidden.reshape(-1, self.hidden.shape[-1]))

    def take(self, rows: Tensor | slice) -> ProjectedLogits:
        """The teacher of some of the tokens."""
        return replace(self, hidden=self.hidden[rows])


@dataclass(frozen=True)
class TopKLogits:
    """A teacher known at K ids of each token, as a cache stores it.

    Outside those ids the teacher gets the student's shape: `pi_T(v) = tau_T * p(v) / tau_p`, with the teacher's tail
    mass tau_T = 1 - sum_k pi_T(k) and the student's mass tau_p outside the ids. This is exact at any K where teacher
    and student agree, and equals the dense teacher at K = V. Log-probabilities are in nats; pad with -inf.
    """

    ids: Tensor  # (N, K) or (..., K), distinct in a row
    log_probs: Tensor  # like ids

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def width(self) -> int:
        """T of (B, T, K) ids."""
        return self.ids.shape[1]

    def flatten(self) -> TopKLogits:
        """All tokens in one dimension, (N, K)."""
        return TopKLogits(self.ids.flatten(0, -2), self.log_probs.flatten(0, -2))

    def take(self, rows: Tensor | slice) -> TopKLogits:
        """The teacher of some of the tokens."""
        return TopKLogits(self.ids[rows], self.log_probs[rows])

    def dense(self, logits: Tensor) -> Tensor:  # (N, V) -> (N, V) float64
        """Log-probabilities of all columns beside a student with these logits, written out: for a few tokens only."""
        known = self.log_probs.double()
        tail = torch.log(-torch.expm1(known.logsumexp(-1, keepdim=True).clamp(max=0)))
        ids = self.ids.long()
        shape = logits.double().scatter(-1, ids, -torch.inf).log_softmax(-1)
        return (shape + tail).nan_to_num(nan=-torch.inf, neginf=-torch.inf).scatter(-1, ids, known)


TeacherLogits = ProjectedLogits | TopKLogits


@dataclass(frozen=True)
class DenseTile:
    """The logits of a dense teacher for the rows of one tile, before its softcap."""

    logits: Tensor  # (n, V)
    softcap: float | None = None

    def take(self, rows: slice) -> DenseTile:
        """The rows of one block."""
        return DenseTile(self.logits[rows], self.softcap)


TeacherTile = DenseTile | TopKLogits  # a top-K teacher is its own tile: K numbers a row need no projection
