"""The reader that computes the loss of one batch inside the model's forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ..loss.fused import LabelCount, QTargetOutput, qtarget_loss
from ..loss.products import Head
from ..loss.teacher import ProjectedLogits, TeacherLogits, TopKLogits
from ..model.head import dense_logits, gathered
from ..theory.reference import IGNORE, dense_tokens
from ..theory.target import Target
from .self_check import SELF_CHECK_TOKENS


@dataclass
class ScoredOutput(ModelOutput):
    """What a scoring forward returns, as transformers and the wrappers around a model expect it."""

    total: Tensor | None = None  # () the loss summed over labelled tokens, which carries the gradient
    sums: Tensor | None = None  # (len(SUMS),) detached
    aux_loss: Tensor | None = None  # ()


SUMS = ("tokens", "nll", "entropy", "top1", "trust", "moved", "target_p_y", "grad_mass")


@dataclass
class Scorer:
    """The reader that computes the loss of one batch, and says whether it was ever called."""

    target: Target
    backend: str = "auto"
    chunk_size: int | None = None
    columns: int | None = None  # compare student and teacher over these first ids only
    teacher: TeacherLogits | None = None  # hidden (B, T, D_T); ids and log_probs (B, T, K)
    reference_log_p_y: Tensor | None = None  # (B, T)
    reference_mass: Tensor | None = None  # (B, T)
    token_weight: Tensor | None = None  # (B, T)
    trust: Tensor | None = None  # (B, T)
    trajectory: Tensor | None = None  # (B, T)
    labelled: LabelCount | None = None
    check: bool = False
    called: bool = False

    def __call__(self, hidden: Tensor, labels: Tensor, head: Head, aux_loss: Tensor | None) -> ScoredOutput:
        self.called = True
        hidden, labels = self._without_virtual_tokens(hidden, labels)
        taught = (self.teacher.weight, self.teacher.bias) if isinstance(self.teacher, ProjectedLogits) else ()
        with gathered(head.weight, head.bias, *taught):
            head = head if self.columns is None else head.first(self.columns)
            teacher = self._flat_teacher(hidden.device)
            out = self._loss(hidden, labels, head, teacher)
            if self.check and not self.target.whole_batch:
                self._compare_with_reference(hidden, labels, head, teacher, out)
        count = (labels != IGNORE).sum()
        vectors = (-out.log_p_y, out.entropy, out.is_top1, out.trust, out.moved, out.target_p_y, out.grad_mass)
        sums = torch.stack([count.float(), *(x.sum(dtype=torch.float32) for x in vectors)])
        return ScoredOutput(out.loss, sums, aux_loss)

    def _loss(self, hidden: Tensor, labels: Tensor, head: Head, teacher: TeacherLogits | None) -> QTargetOutput:
        return qtarget_loss(
            hidden,
            head.weight,
            labels,
            self.target,
            teacher=teacher,
            reference_log_p_y=self.reference_log_p_y,
            reference_mass=self.reference_mass,
            token_weight=self.token_weight,
            trust=self.trust,
            trajectory=self.trajectory,
            bias=head.bias,
            logit_scale=head.scale,
            softcap=head.softcap,
            backend=self.backend,
            chunk_size=self.chunk_size,
            labelled=self.labelled,
        )

    def log_p_y(self, other: ProjectedLogits, labels: Tensor) -> Tensor:  # (B, T)
        """log-probabilities of the labels under a model that was read, (B, T) as its hidden states."""
        with gathered(other.weight, other.bias):
            head = other.head if self.columns is None else other.head.first(self.columns)
            return self._loss(other.hidden, labels, head, None).log_p_y

    def _without_virtual_tokens(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Prompt tuning puts tokens before the student's that no teacher sees, and nothing is learnt on them."""
        given = (self.reference_log_p_y, self.reference_mass, self.token_weight, self.trust, self.trajectory)
        beside = [x.shape[1] for x in given if x is not None]
        beside += [self.teacher.hidden.shape[1]] if isinstance(self.teacher, ProjectedLogits) else []
        beside += [self.teacher.ids.shape[1]] if isinstance(self.teacher, TopKLogits) else []
        width = min([*beside, hidden.shape[1]])
        return hidden[:, hidden.shape[1] - width :], labels[:, labels.shape[1] - width :]

    def _flat_teacher(self, device: torch.device) -> TeacherLogits | None:
        t = self.teacher
        if t is None:
            return None
        if isinstance(t, TopKLogits):
            return TopKLogits(t.ids.flatten(0, 1), t.log_probs.flatten(0, 1))
        head = t.head if self.columns is None else t.head.first(self.columns)
        bias = None if head.bias is None else head.bias.to(device)
        hidden = t.hidden.flatten(0, 1).to(device)
        return ProjectedLogits(hidden, head.weight.to(device), bias, t.logit_scale, t.softcap)

    @torch.no_grad()
    def _compare_with_reference(
        self, hidden: Tensor, labels: Tensor, head: Head, teacher: TeacherLogits | None, out: QTargetOutput
    ) -> None:
        """Stop if the fused loss of a few tokens is not the specified one."""
        rows = (labels.flatten() != IGNORE).nonzero().squeeze(-1)[:SELF_CHECK_TOKENS]
        if not len(rows):
            return
        few = None if teacher is None else teacher.take(rows)
        logits = dense_logits(hidden.flatten(0, 1)[rows], head)
        taught = None
        if few is not None:
            taught = few.dense(logits) if isinstance(few, TopKLogits) else dense_logits(few.hidden, few.head)
        given = (self.reference_log_p_y, self.token_weight, None, self.reference_mass, self.trust)
        tokens = dense_tokens(
            logits.double().log_softmax(-1),
            labels.flatten()[rows],
            self.target,
            taught,
            *(None if x is None else x.flatten()[rows] for x in given),
        )
        expected = self.target.token_loss(self.target.weights(tokens), tokens)
        got = out.token_loss.flatten()[rows]
        close = (got - expected).abs() <= 0.05 * expected.abs() + 0.05
        # a threshold (profit, psft, prift) may fall on either side in half precision, for a few tokens
        if close.float().mean() < 0.9:
            raise RuntimeError(
                f"The fused loss differs from its specification on this model: {got.mean():.4f} against "
                f"{expected.mean():.4f} nats a token. Please report it with the model's name; "
                "qtarget_self_check=False trains on regardless."
            )
