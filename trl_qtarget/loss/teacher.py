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
    and student agree, and equals the dense teacher at K = V. Log-probabilities are in nats. An entry of -inf is
    padding, whatever its id, and each token needs at least one entry that is not.
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

    def check(self, columns: int) -> None:
        """Raise a ValueError for a row without a known id, an id outside [0, columns), or a known id given twice."""
        known = self.log_probs > -torch.inf
        if not known.any(-1).all():
            row = int((~known.any(-1)).nonzero()[0])
            raise ValueError(f"teacher.log_probs is -inf throughout row {row}: each token needs at least one id.")
        outside = known & ((self.ids < 0) | (self.ids >= columns))
        if outside.any():
            row = int(outside.any(-1).nonzero()[0])
            raise ValueError(
                f"teacher.ids has {int(self.ids[row][outside[row]][0])} in row {row}: ids lie in [0, {columns})."
            )
        # padding gets distinct negative ids, so that equal neighbours of the sorted ids are real repetitions
        padding = -1 - torch.arange(self.ids.shape[-1], device=self.ids.device)
        ordered = self.ids.long().where(known, padding).sort(-1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]).any(-1)
        if twice.any():
            row = int(twice.nonzero()[0])
            same = ordered[row, 1:][ordered[row, 1:] == ordered[row, :-1]]
            raise ValueError(
                f"teacher.ids has {int(same[0])} twice in row {row}: ids of a row must be distinct. Padding has -inf "
                "in log_probs."
            )

    def without_padding(self) -> TopKLogits:
        """The same teacher, with the ids of padding (-inf) replaced by the row's most probable id.

        Padded ids belong to the tail. The replacement repeats an id that is known anyway, so kernels can gather and
        scatter all K entries of a row without touching the logits of ids that only pad it.
        """
        best = self.log_probs.argmax(-1, keepdim=True)
        return TopKLogits(self.ids.where(self.log_probs > -torch.inf, self.ids.gather(-1, best)), self.log_probs)

    def dense(self, logits: Tensor) -> Tensor:  # (N, V) -> (N, V) float64
        """Write out log-probabilities of all columns, the tail in the shape of a student with these logits."""
        known = self.log_probs.double()
        tail = torch.log(-torch.expm1(known.logsumexp(-1, keepdim=True).clamp(max=0)))
        ids = self.without_padding().ids.long()
        known = known.where(known > -torch.inf, known.amax(-1, keepdim=True))  # the value of the id that it repeats
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
