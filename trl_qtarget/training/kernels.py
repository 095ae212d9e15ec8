"""How a run computes its loss: backend, tokens of a tile, ids that are compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..loss.fused import LabelCount, QTargetOutput, qtarget_loss
from ..loss.per_token import PerToken
from ..loss.products import Head
from ..loss.teacher import ProjectedLogits, TeacherLogits
from ..model.head import gathered
from ..theory.target import Target


@dataclass(frozen=True)
class Kernels:
    """How the loss of a run is computed; backend and chunk size change results by rounding only."""

    backend: str = "auto"
    chunk_size: int | None = None
    vocabulary: int | None = None  # student and teacher are compared over these first ids; None: over all

    def loss(
        self,
        hidden: Tensor,
        head: Head,
        target: Target,
        tokens: PerToken,
        teacher: TeacherLogits | None = None,
        labelled: LabelCount | None = None,
    ) -> QTargetOutput:
        """`qtarget_loss` of hidden states and a gathered head."""
        head = self.compared(head)
        return qtarget_loss(
            hidden,
            head.weight,
            target=target,
            teacher=teacher,
            bias=head.bias,
            logit_scale=head.scale,
            softcap=head.softcap,
            backend=self.backend,
            chunk_size=self.chunk_size,
            labelled=labelled,
            **tokens.columns(),
        )

    def compared(self, head: Head) -> Head:
        """The head over the ids that student and teacher are compared on."""
        return head if self.vocabulary is None else head.first(self.vocabulary)

    @torch.no_grad()
    def label_log_probs(self, model: ProjectedLogits, labels: Tensor) -> Tensor:  # (B, T)
        """The log-probability, in nats, that a frozen model gives each label, zero where the label is ignored."""
        with gathered(model.weight, model.bias):
            return self.loss(model.hidden, model.head, Target(), PerToken(labels)).log_p_y
