"""`qtarget_loss`: any loss of the framework, straight from hidden states and head, without (N, V) logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isclose

import torch
from torch import Tensor

from ..theory.reference import IGNORE
from ..theory.target import Target
from .backends import tiles_for
from .chunked import Job, QTargetFunction
from .products import Head
from .teacher import ProjectedLogits, TeacherLogits, TopKLogits


PER_TOKEN = ("labels", "reference_log_p_y", "reference_mass", "token_weight", "trust", "trajectory")


@dataclass(frozen=True)
class QTargetOutput:
    """The loss, and what it saw at each token: detached (N,) vectors, zero where the label is ignored."""

    loss: Tensor  # () sum over labelled tokens, nats; carries the gradient
    token_loss: Tensor  # published value of the loss, nats
    log_p_y: Tensor  # student's log-probability of the label, nats
    trust: Tensor  # gamma
    entropy: Tensor  # H(p), nats
    is_top1: Tensor  # bool: no token is more probable to the student than the label
    target_p_y: Tensor  # Q(y)
    moved: Tensor  # 1/2 ||Q - p||_1, how far the target is from the student
    grad_mass: Tensor  # s/2 ||Q - p||_1, half the L1 norm of the gradient in the logits


class LabelCount:
    """How many labels are not ignored, on its way to the host: begun before a model runs, read after it was launched.

    Without it a GPU's queue runs empty while the host waits for this one number to learn how many rows there are.
    """

    def __init__(self, labels: Tensor):
        self.count, self.event = (labels != IGNORE).sum(), None
        if labels.is_cuda:
            self.count = torch.empty((), dtype=torch.int64, pin_memory=True).copy_(self.count, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def __int__(self) -> int:
        if self.event is not None:
            self.event.synchronize()
        return int(self.count)


def qtarget_loss(
    hidden: Tensor,  # (N, D) or (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,) or (...,), -100 where there is nothing to learn
    target: Target,
    *,
    teacher: TeacherLogits | None = None,
    reference_log_p_y: Tensor | None = None,  # (N,)
    reference_mass: Tensor | None = None,  # (N,)
    token_weight: Tensor | None = None,  # (N,)
    trust: Tensor | None = None,  # (N,) NaN where the target's own is meant
    trajectory: Tensor | None = None,  # (N,) ids; None: all tokens are one trajectory
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
    labelled: LabelCount | int | None = None,
) -> QTargetOutput:
    """Sum over labelled tokens of `s_t * CE(stopgrad[Q_t], p_t)`, with `Q = gamma * delta_y + (1 - gamma) * pi~`.

    It replaces, for `nll`, these lines, and for other targets their like, in value and in gradient:

        logits = (hidden @ weight.T + bias).float() * logit_scale
        logits = softcap * tanh(logits / softcap)
        loss = cross_entropy(logits, labels, ignore_index=-100, reduction="sum")

    Labels are those of the hidden states beside them: shift them first. Divide `loss` by the number of tokens of the
    whole optimizer step. The gradient (float32 until it is cast to its tensor's type) reaches hidden, weight and bias
    where they require one; everything about Q is constant. The value of `loss` is the published one (see `Target`),
    which may differ from that of the cross entropy by what is constant for the gradient.

    Args:
        teacher: pi_T, or pi_ref, for targets that need one; rows are those of `hidden`.
        reference_log_p_y: log pi_ref(y) (iw_sft, prift) or log pi_old(y) (psft); read off `teacher` if that is dense.
        reference_mass: rank mass of y under pi_ref (prift with statistic="mass"); computed from `teacher` otherwise.
        trust: replaces gamma where it is a number.
        token_weight: multiplies each token's loss; for `critical_token`, its mask.
        chunk_size: tokens per tile; None takes them from a budget of bytes. Results do not depend on it.
        backend: "auto" (Triton where it drives the device, else torch), "triton" or "torch".
        labelled: how many labels are not ignored, where that is known: it spares waiting for the device.

    Raises:
        ValueError: shapes that do not fit, an input that the target needs and that is missing, an unknown backend, or
            a top-K teacher with a residual whose exponents do not sum to one.
    """
    shape, labels = labels.shape, labels.reshape(-1)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    head = Head(weight, bias, float(logit_scale), softcap)
    job = Job(
        target=target,
        tiles=tiles_for(backend, hidden.device),
        labels=labels,
        teacher=_flat_teacher(teacher),
        reference_log_p_y=_flat(reference_log_p_y),
        reference_mass=_flat(reference_mass),
        token_weight=_flat(token_weight),
        trust=_flat(trust),
        trajectory=_flat(trajectory),
        chunk_size=chunk_size,
    )
    _check(hidden, head, job)
    keep = _labelled_rows(labels, labelled)
    if len(keep) < len(labels):
        hidden, job = hidden.index_select(0, keep), _take(job, keep)
    job = _only_what_is_needed(job)
    wants = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias))
    compute = weight.dtype
    if torch.is_autocast_enabled(hidden.device.type) and compute != torch.float64:
        compute = torch.get_autocast_dtype(hidden.device.type)
    with torch.no_grad():
        head = head.to(compute)
    loss = QTargetFunction.apply(hidden, weight, bias, job, head, wants)
    return QTargetOutput(loss, **{name: _spread(x, keep, shape) for name, x in job.columns.items()})


def _labelled_rows(labels: Tensor, count: LabelCount | int | None) -> Tensor:
    ignored = labels == IGNORE
    if count is None:
        return ignored.logical_not().nonzero().squeeze(-1)
    return ignored.to(torch.uint8).argsort(stable=True)[: int(count)]  # `nonzero` would ask the device for its size


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1)


def _flat_teacher(teacher: TeacherLogits | None) -> TeacherLogits | None:
    if isinstance(teacher, ProjectedLogits):
        return replace(teacher, hidden=teacher.hidden.reshape(-1, teacher.hidden.shape[-1]))
    if isinstance(teacher, TopKLogits):
        return TopKLogits(teacher.ids.flatten(0, -2), teacher.log_probs.flatten(0, -2))
    return teacher


def _take(job: Job, keep: Tensor) -> Job:
    given = {name: x for name in PER_TOKEN if (x := getattr(job, name)) is not None}
    teacher = None if job.teacher is None else job.teacher.take(keep)
    return replace(job, teacher=teacher, **{name: x.index_select(0, keep) for name, x in given.items()})


def _only_what_is_needed(job: Job) -> Job:
    """Drop a teacher and trajectories that the target does not read, and number the others from zero."""
    reads_label = {"reference_log_p_y", "snapshot"} & set(job.target.needs) and job.reference_log_p_y is None
    teacher = job.teacher if job.target.reads_logits() or reads_label else None
    if isinstance(teacher, ProjectedLogits):
        dtype = teacher.weight.dtype
        teacher = replace(teacher, hidden=teacher.hidden.detach().to(dtype), weight=teacher.weight.detach())
    trajectory = job.trajectory if job.target.whole_batch else None
    if trajectory is not None:
        trajectory = trajectory.unique(return_inverse=True)[1]
    if isinstance(teacher, TopKLogits):
        teacher = replace(teacher, ids=teacher.ids.long())  # a cache keeps them as int32
    return replace(job, teacher=teacher, trajectory=trajectory)


def _spread(x: Tensor, keep: Tensor, shape: torch.Size) -> Tensor:
    """Per-token results back to where the labels were."""
    return x.new_zeros(shape.numel()).index_copy(0, keep, x).view(shape)


def _check(hidden: Tensor, head: Head, job: Job) -> None:
    N = len(hidden)
    if job.chunk_size is not None and job.chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {job.chunk_size}.")
    if head.softcap is not None and head.softcap <= 0:
        raise ValueError(f"softcap must be positive, or None for no cap, got {head.softcap}.")
    for name in ("teacher", *PER_TOKEN):
        x = getattr(job, name)
        if x is not None and len(x) != N:
            raise ValueError(f"{name} has {len(x)} rows, hidden has {N}: there must be one for each token.")
    if hidden.shape[-1] != head.weight.shape[-1]:
        raise ValueError(f"hidden is {hidden.shape[-1]} wide, weight is {head.weight.shape[-1]}: they must agree.")
    job.target.require(
        teacher=job.teacher is not None,
        reference_log_p_y=job.reference_log_p_y is not None,
        reference_mass=job.reference_mass is not None,
        token_weight=job.token_weight is not None,
    )
    residual = job.target.residual
    if (
        isinstance(job.teacher, TopKLogits)
        and residual.teacher != 0
        and not isclose(residual.student + residual.teacher, 1)
    ):
        raise ValueError(
            f"A top-K teacher leaves its tail to the student, which needs a residual whose exponents sum to one; "
            f"{residual} does not. Pass dense logits as ProjectedLogits."
        )
