"""The reader that computes the loss of one batch, inside the forward of the model that is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ..loss.fused import LabelCount
from ..loss.per_token import PerToken
from ..loss.products import Head
from ..loss.teacher import ProjectedLogits, TeacherLogits
from ..model.head import gathered
from ..theory.reference import IGNORE
from ..theory.target import Target
from .kernels import Kernels
from .self_check import compare_with_reference


SUMS = ("tokens", "nll", "entropy", "top1", "trust", "moved", "target_p_y", "grad_mass")


@dataclass
class ScoredOutput(ModelOutput):
    """The result of a scoring forward, as transformers and the wrappers around a model expect results."""

    total: Tensor | None = None  # () the loss summed over labelled tokens, which carries the gradient
    sums: Tensor | None = None  # (len(SUMS),) detached
    aux_loss: Tensor | None = None  # ()


@dataclass
class Scorer:
    """Computes the loss of one batch from hidden states and head; `called` tells whether the forward called it."""

    target: Target
    tokens: PerToken  # (B, T)
    kernels: Kernels
    teacher: TeacherLogits | None = None  # hidden (B, T, D_T), or ids and log_probs (B, T, K)
    labelled: LabelCount | None = None
    check: bool = False  # compare a few tokens with the specification
    called: bool = False

    def __call__(self, hidden: Tensor, labels: Tensor, head: Head, aux_loss: Tensor | None) -> ScoredOutput:
        self.called = True
        hidden, tokens = self._without_virtual_tokens(hidden, labels)
        taught = (self.teacher.weight, self.teacher.bias) if isinstance(self.teacher, ProjectedLogits) else ()
        with gathered(head.weight, head.bias, *taught):
            teacher = self._comparable_teacher(hidden.device)
            out = self.kernels.loss(hidden, head, self.target, tokens, teacher, self.labelled)
            if self.check:
                compare_with_reference(self.kernels, self.target, hidden, head, tokens, teacher, out)
        count = (tokens.labels != IGNORE).sum()
        vectors = (-out.log_p_y, out.entropy, out.is_top1, out.trust, out.moved, out.target_p_y, out.grad_mass)
        sums = torch.stack([count.float(), *(x.sum(dtype=torch.float32) for x in vectors)])
        return ScoredOutput(out.loss, sums, aux_loss)

    def _without_virtual_tokens(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, PerToken]:
        """Drop positions that prompt tuning adds in front, if a teacher or a column of the data lacks them.

        The labels come from the forward, where PEFT has made them as long as the hidden states.
        """
        tokens = replace(self.tokens, labels=labels)
        widths = [column.shape[1] for name, column in tokens.columns().items() if name != "labels"]
        if self.teacher is not None:
            widths.append(self.teacher.width)
        width = min([*widths, hidden.shape[1]])
        return hidden[:, hidden.shape[1] - width :], tokens.last(width)

    def _comparable_teacher(self, device: torch.device) -> TeacherLogits | None:
        """The teacher over the compared ids, on the student's device."""
        t = self.teacher
        if not isinstance(t, ProjectedLogits):
            return t
        head = self.kernels.compared(t.head)
        bias = None if head.bias is None else head.bias.to(device)
        return replace(t, hidden=t.hidden.to(device), weight=head.weight.to(device), bias=bias)
