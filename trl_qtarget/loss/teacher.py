"""What a teacher hands the loss: a distribution for every token, dense or known at a few ids only."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .products import Head


@dataclass(frozen=True)
class ProjectedLogits:
    """A teacher's last hidden states and its head: logits are projected tile by tile and never stored.

    The teacher may have more or fewer columns than the student: the two are compared over the common first ones, and
    its distribution is normalised over those.
    """

    hidden: Tensor  # (N, D_T)
    weight: Tensor  # (V_T, D_T)
    bias: Tensor | None = None  # (V_T,)
    logit_scale: float = 1.0
    softcap: float | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def take(self, rows: Tensor | slice) -> ProjectedLogits:
        """The teacher of some of the tokens."""
        return replace(self, hidden=self.hidden[rows])

    @property
    def head(self) -> Head:
        return Head(self.weight, self.bias, self.logit_scale, self.softcap)


@dataclass(frozen=True)
class TopKLogits:
    """A teacher known at K ids of each token, as a cache keeps it.

    Outside those ids it is given the student's shape: `pi_T(v) = tau_T * p(v) / tau_p`, with the teacher's tail mass
    tau_T = 1 - sum_k pi_T(k), and the student's own there, tau_p. That is exact where teacher and student agree,
    whatever K, and equals the dense teacher at K = V. Log-probabilities are in nats; pad with -inf.
    """

    ids: Tensor  # (N, K) distinct in a row
    log_probs: Tensor  # (N, K)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Tensor | slice) -> TopKLogits:
        """The teacher of some of the tokens."""
        return TopKLogits(self.ids[rows], self.log_probs[rows])

    def dense(self, logits: Tensor) -> Tensor:  # (N, V) -> (N, V) float64
        """Its log-probabilities of all columns, beside a student with these logits: for a few tokens only."""
        known = self.log_probs.double()
        tail = torch.log(-torch.expm1(known.logsumexp(-1, keepdim=True).clamp(max=0)))
        ids = self.ids.long()
        shape = logits.double().scatter(-1, ids, -torch.inf).log_softmax(-1)
        return (shape + tail).nan_to_num(nan=-torch.inf, neginf=-torch.inf).scatter(-1, ids, known)


TeacherLogits = ProjectedLogits | TopKLogits
