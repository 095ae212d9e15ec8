"""`qtarget_loss`: any loss of the framework, straight from hidden states and head, without (N, V) logits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..theory.reference import IGNORE, require_tokenwise
from ..theory.target import Target
from .backends import tiles_for
from .chunked import Job, QTargetFunction, TokenResults, Wants
from .per_token import PerToken
from .products import Head
from .teacher import ProjectedLogits, TeacherLogits, TopKLogits


@dataclass(frozen=True)
class QTargetOutput:
    """The loss, and statistics of each token: detached (N,) vectors, zero where the label is ignored."""

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
    """The number of labels that are not ignored, and their range, copied to the host while the model runs.

    The copy starts before the model's forward pass is launched and is read after it. A blocking copy in between would
    leave the GPU idle until the host knows how many rows the loss has.
    """

    def __init__(self, labels: Tensor):
        labelled = labels != IGNORE
        kept = labels.where(labelled, 0)
        least, greatest = kept.aminmax() if labels.numel() else (kept.sum(), kept.sum())
        self.numbers, self.event = torch.stack([labelled.sum(), least, greatest]), None
        if labels.is_cuda:
            self.numbers = torch.empty(3, dtype=torch.int64, pin_memory=True).copy_(self.numbers, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> list[int]:
        """The count, and the least and greatest label, where ignored labels count as 0."""
        if self.event is not None:
            self.event.synchronize()
        return self.numbers.tolist()

    def __int__(self) -> int:
        return self.read()[0]


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

    For the target `nll` it replaces these lines, in value and in gradient:

        logits = (hidden @ weight.T + bias).float() * logit_scale
        logits = softcap * tanh(logits / softcap)
        loss = cross_entropy(logits, labels, ignore_index=-100, reduction="sum")

    Each label is the one that the hidden state beside it predicts: shift the labels first. Divide `loss` by the number
    of tokens of the whole optimizer step. The gradient (float32 until it is cast to its tensor's type) reaches hidden,
    weight and bias where they require one; everything about Q is constant. The value of `loss` is the published one
    (see `Target`), which may differ from the cross entropy by a term without gradient.

    Args:
        teacher: pi_T, or pi_ref, for targets that need one; one row for each row of `hidden`.
        reference_log_p_y: log pi_ref(y) (iw_sft, prift) or log pi_old(y) (psft). Without this column the number is
            computed from a dense `teacher`.
        reference_mass: rank mass of y under pi_ref (prift with statistic="mass"). Without this column the number is
            computed from a dense `teacher`.
        trust: replaces gamma at every token where this column is not NaN.
        token_weight: multiplies each token's loss; `critical_token` reads the column as its mask.
        chunk_size: tokens per tile; None takes them from a budget of bytes. Results do not depend on it.
        backend: "auto" (Triton on CUDA, ROCm and XPU devices, else torch), "triton" or "torch".
        labelled: the number of labels that are not ignored. If it is given, the host does not wait for the device, and
            a plain number skips the check of ids.

    Raises:
        ValueError: shapes that do not fit, an input that the target needs and that is missing, an unknown backend, or
            a top-K teacher with a residual whose exponents do not sum to one.
    """
    shape, N = labels.shape, labels.numel()
    tokens = PerToken(
        labels,
        token_weight=token_weight,
        trust=trust,
        reference_log_p_y=reference_log_p_y,
        reference_mass=reference_mass,
        trajectory=trajectory,
    ).flatten()
    hidden = hidden.reshape(-1, hidden.shape[-1])
    teacher = None if teacher is None else teacher.flatten()
    head = Head(weight, bias, float(logit_scale), softcap)
    tiles = tiles_for(backend, hidden.device)
    _check(hidden, head, target, tokens, teacher, chunk_size)
    _check_ids(tokens.labels, labelled, teacher, len(weight))
    keep = _labelled_rows(tokens.labels, labelled)
    if len(keep) < N:
        hidden, tokens = hidden.index_select(0, keep), tokens.take(keep)
        teacher = None if teacher is None else teacher.take(keep)
    tokens, teacher = _only_what_is_read(target, tokens, teacher)
    wants = Wants(*(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)))
    compute = weight.dtype
    if torch.is_autocast_enabled(hidden.device.type) and compute != torch.float64:
        compute = torch.get_autocast_dtype(hidden.device.type)
    with torch.no_grad():
        head = head.to(compute)
    job = Job(target, tiles, tokens, teacher, chunk_size)
    loss, *results = QTargetFunction.apply(hidden, weight, bias, job, head, wants)
    named = zip(TokenResults._fields, results, strict=True)
    return QTargetOutput(loss, **{name: _spread(column, keep, shape) for name, column in named})


def _labelled_rows(labels: Tensor, count: LabelCount | int | None) -> Tensor:
    ignored = labels == IGNORE
    if count is None:
        return ignored.logical_not().nonzero().squeeze(-1)
    # `nonzero` would wait for the device to know the size of its result
    return ignored.to(torch.uint8).argsort(stable=True)[: int(count)]


def _only_what_is_read(
    target: Target, tokens: PerToken, teacher: TeacherLogits | None
) -> tuple[PerToken, TeacherLogits | None]:
    """Drop a teacher and trajectories that the target does not read, and cast the rest to the types of the kernels.

    Trajectories are numbered from zero. A cache stores ids as int32, and `gather` takes int64 alone.
    """
    if not (target.reads_logits() or _reads_label(target, tokens)):
        teacher = None
    elif isinstance(teacher, ProjectedLogits):
        dtype = teacher.weight.dtype
        teacher = replace(teacher, hidden=teacher.hidden.detach().to(dtype), weight=teacher.weight.detach())
    elif teacher is not None:
        teacher = teacher.without_padding()
        teacher = replace(teacher, ids=teacher.ids.long())
    trajectory = tokens.trajectory if target.whole_batch else None
    if trajectory is not None:
        trajectory = trajectory.unique(return_inverse=True)[1]
    return replace(tokens, trajectory=trajectory), teacher


def _check_ids(labels: Tensor, labelled: LabelCount | int | None, teacher: TeacherLogits | None, V: int) -> None:
    """Refuse ids outside the vocabulary, which kernels would read beyond a row, and ids that a teacher has twice.

    A look at all ids would wait for the device. So a trainer passes a `LabelCount`, which has the range of the labels,
    and a cache has checked its ids. Without a count the loss waits for the device anyway; a number skips the check.
    """
    if isinstance(labelled, LabelCount):
        _, least, greatest = labelled.read()
        suspicious = not 0 <= least <= greatest < V
    else:
        suspicious = labelled is None
    if suspicious:
        outside = (labels != IGNORE) & ((labels < 0) | (labels >= V))
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"labels has {int(labels[row])} in row {row}: labels lie in [0, {V}), and {IGNORE} is ignored."
            )
    if isinstance(teacher, TopKLogits) and labelled is None:
        teacher.take(labels != IGNORE).check(V)


def _reads_label(target: Target, tokens: PerToken) -> bool:
    """Whether the target reads the label's log-probability under another model and no column gives it."""
    return bool({"reference_log_p_y", "snapshot"} & set(target.needs)) and tokens.reference_log_p_y is None


def _spread(column: Tensor, keep: Tensor, shape: torch.Size) -> Tensor:
    """Results of the labelled tokens back in the shape of the labels, zero elsewhere."""
    return column.new_zeros(shape.numel()).index_copy(0, keep, column).view(shape)


def _check(
    hidden: Tensor,
    head: Head,
    target: Target,
    tokens: PerToken,
    teacher: TeacherLogits | None,
    chunk_size: int | None,
) -> None:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}.")
    if head.softcap is not None and head.softcap <= 0:
        raise ValueError(f"softcap must be positive, or None for no cap, got {head.softcap}.")
    given = tokens.columns() if teacher is None else {"teacher": teacher, **tokens.columns()}
    for name, x in given.items():
        if len(x) != len(hidden):
            raise ValueError(f"{name} has {len(x)} rows, hidden has {len(hidden)}: there must be one for each token.")
    if hidden.shape[-1] != head.weight.shape[-1]:
        raise ValueError(f"hidden is {hidden.shape[-1]} wide, weight is {head.weight.shape[-1]}: they must agree.")
    target.require(teacher=teacher is not None, columns=tokens.columns())
    require_tokenwise(target)
    residual = target.residual
    if isinstance(teacher, TopKLogits) and residual.is_student and _reads_label(target, tokens):
        raise ValueError(
            "A top-K teacher does not give every label's log-probability: pass reference_log_p_y, or dense logits as "
            "ProjectedLogits."
        )
    if isinstance(teacher, TopKLogits) and residual.teacher != 0 and not residual.sums_to_one:
        raise ValueError(
            f"A top-K teacher leaves its tail to the student, which needs a residual whose exponents sum to one; "
            f"{residual} does not. Pass dense logits as ProjectedLogits."
        )
