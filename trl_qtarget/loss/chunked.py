"""The walk over labelled tokens: project a tile, read its rows, weigh them, write the gradient over it, multiply.

    stage                    writes
    project student          (n, V) logits tile, and a second one for a dense teacher
    per block of rows        statistics -> the target's weights -> the gradient, over the logits
    two products             (n, D) rows of the hidden gradient; adds to the (V, D) head gradient

Everything happens in the forward pass, while the tile exists: three products for a loss of label trust, four with a
dense teacher. A `whole_batch` target projects the student once more, to weigh all tokens together. The backward pass
multiplies by the upstream scalar. An input that needs no gradient costs neither a product nor a buffer.

N: labelled tokens, n: tokens of a tile, D: width, V: columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..theory.target import RowWeights, Target
from .per_token import PerToken
from .products import Head, add_weight_gradient, gradient_dtype, hidden_gradient, precise, project, wide
from .scratch import scratch
from .teacher import DenseTile, ProjectedLogits, TeacherLogits, TeacherTile


TILE_BYTES = {"cpu": 5 * 2**25}  # of one tile's logits, student and teacher together; on other devices:
TILE_BYTES_ACCELERATOR = 2**30  # some 1,700 rows: below a thousand, adding to the (V, D) gradient waits for memory
ROW_MULTIPLE = 128  # of rows in a tile: a product of fewer rows leaves multiprocessors idle


@dataclass(frozen=True)
class Job:
    """The constant inputs of one evaluation of the loss, beside hidden states and head."""

    target: Target
    tiles: ModuleType  # `torch_tiles` or `triton_tiles`
    tokens: PerToken  # (N,), none ignored
    teacher: TeacherLogits | None = None
    chunk_size: int | None = None  # tokens of a tile; None takes them from a budget of bytes


class Wants(NamedTuple):
    """The inputs that need a gradient."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


class TokenResults(NamedTuple):
    """Results of N tokens, (N,) each; `QTargetOutput` documents them."""

    token_loss: Tensor
    log_p_y: Tensor
    trust: Tensor
    entropy: Tensor
    is_top1: Tensor
    target_p_y: Tensor
    moved: Tensor
    grad_mass: Tensor

    @classmethod
    def zeros(cls, N: int, dtype: torch.dtype, device: torch.device) -> TokenResults:
        kinds = {name: torch.bool if name == "is_top1" else dtype for name in cls._fields}
        return cls(**{name: torch.zeros(N, dtype=kind, device=device) for name, kind in kinds.items()})

    def write(self, at: slice, **values: Tensor) -> None:
        """Store the results of some of the tokens."""
        for name, value in values.items():
            column = getattr(self, name)
            column[at] = value.to(column.dtype)


class Gradients(NamedTuple):
    """Gradients of the summed loss, float32 or wider and without `Head.scale`; None for an input that needs none."""

    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)

    @classmethod
    def allocate(cls, hidden: Tensor, head: Head, wants: Wants) -> Gradients:
        N, (V, D), dtype = len(hidden), head.weight.shape, wide(hidden.dtype)
        empty = hidden.new_empty if N else hidden.new_zeros  # without tokens no tile writes the head's gradient
        return cls(
            hidden.new_empty(N, D, dtype=dtype) if wants.hidden else None,
            empty(V, D, dtype=dtype) if wants.weight else None,
            hidden.new_zeros(V, dtype=dtype) if wants.bias else None,
        )

    def add(self, tile: Tensor, hidden: Tensor, head: Head, part: slice) -> None:
        """Multiply the (n, V) gradient of one tile into these gradients; `part` is the tile's place among N tokens."""
        if self.hidden is not None:
            hidden_gradient(tile, head.weight, self.hidden[part])
        if self.weight is not None:
            add_weight_gradient(tile, hidden[part], self.weight, first=part.start == 0)
        if self.bias is not None:
            self.bias.add_(tile.sum(0, dtype=self.bias.dtype))


class WholeBatch(NamedTuple):
    """Weights and losses of all N tokens, for a target whose rules need all tokens at once."""

    weights: RowWeights
    token_loss: Tensor  # (N,)

    def take(self, at: slice) -> tuple[RowWeights, Tensor]:
        return RowWeights(*(weight[at] for weight in self.weights)), self.token_loss[at]


def evaluate(job: Job, hidden: Tensor, head: Head, wants: Wants) -> tuple[TokenResults, Gradients]:
    """The results of all tokens and the wanted gradients, in one walk over the tokens."""
    N, V, dtype = len(hidden), len(head.weight), wide(hidden.dtype)
    results = TokenResults.zeros(N, dtype, hidden.device)
    whole_batch = _weigh_whole_batch(job, hidden, head) if job.target.whole_batch else None
    gradients = Gradients.allocate(hidden, head, wants)
    dense = isinstance(job.teacher, ProjectedLogits)
    size = job.chunk_size or rows_per_tile(N, V * (1 + dense), dtype, hidden.device.type)
    size = min(size, N)
    student_tile = scratch("student", (size, V), hidden, dtype)
    teacher_tile = scratch("teacher", (size, V), hidden, dtype) if dense else None
    gradient_type = gradient_dtype(hidden)
    over_logits = gradient_type == dtype or not any(wants)
    gradient_tile = student_tile if over_logits else scratch("gradient", (size, V), hidden, gradient_type)
    step = job.tiles.block_rows(V, dtype, hidden.device)
    for start in range(0, N, max(size, 1)):
        part = slice(start, min(start + size, N))
        n = part.stop - start
        z, g = project(hidden[part], head, student_tile[:n]), gradient_tile[:n]
        teacher = _tile_of(job.teacher, part, teacher_tile)
        for first in range(0, n, step):
            block = slice(first, min(first + step, n))
            at = slice(start + block.start, start + block.stop)
            taught = None if teacher is None else teacher.take(block)
            rows = job.tiles.rows(z[block], job.tokens.labels[at], job.target.residual, taught, head.softcap)
            _weigh(job, rows, at, whole_batch, results, g[block] if any(wants) else None)
        gradients.add(g, hidden, head, part)
    return results, gradients


def _tile_of(teacher: TeacherLogits | None, part: slice, tile: Tensor | None) -> TeacherTile | None:
    """The teacher of the tokens in `part`; a dense one is projected into `tile`, -inf where it has no column."""
    if not isinstance(teacher, ProjectedLogits):
        return None if teacher is None else teacher.take(part)
    assert tile is not None
    t, common = tile[: part.stop - part.start], min(tile.shape[-1], len(teacher.weight))
    if common == tile.shape[-1]:
        project(teacher.hidden[part], teacher.head.first(common), t)
    else:
        t[:, :common] = project(teacher.hidden[part], teacher.head, t.new_empty(len(t), common))
        t[:, common:] = -torch.inf
    return DenseTile(t, teacher.softcap)


def _weigh(
    job: Job, rows, at: slice, whole_batch: WholeBatch | None, results: TokenResults, gradient: Tensor | None
) -> None:
    """Store the results of one block of rows and write its gradient, which may take the place of the logits."""
    target, tokens = job.target, job.tokens.take(at).for_rules(precise(rows.log_p_y), rows)
    if whole_batch is None:
        weights = target.weights(tokens)
        loss = target.token_loss(weights, tokens)
    else:
        weights, loss = whole_batch.take(at)
    results.write(
        at,
        token_loss=loss,
        log_p_y=tokens.log_p_y,
        trust=weights.trust,
        entropy=rows.entropy,
        is_top1=rows.is_top1,
        target_p_y=target.target_p_y(weights, tokens),
    )
    # a pooled residual needs a pass over the row to report `moved`: its gradient is written even if none is wanted
    norm = None
    if gradient is not None or not target.residual.is_student:
        out = rows.z if gradient is None else gradient
        norm = rows.write_gradient(weights.label.to(rows.z), weights.residual.to(rows.z), out)
    scale = weights.scale.abs()
    if norm is None:
        moved = weights.trust.abs() * -tokens.log_p_y.expm1()
        results.write(at, moved=moved, grad_mass=scale * moved)
    else:
        mass = norm.to(scale) / 2
        results.write(at, moved=(mass / scale).where(scale > 0, 0), grad_mass=mass)


def _weigh_whole_batch(job: Job, hidden: Tensor, head: Head) -> WholeBatch:
    """Compute log_p_y of all tokens in one extra pass, and from it the weights and losses of the whole batch."""
    plain = Job(Target(), job.tiles, PerToken(job.tokens.labels), chunk_size=job.chunk_size)
    results, _ = evaluate(plain, hidden, head, Wants())
    tokens = job.tokens.for_rules(precise(results.log_p_y), None)
    weights = job.target.weights(tokens)
    return WholeBatch(weights, job.target.token_loss(weights, tokens))


def rows_per_tile(N: int, columns: int, dtype: torch.dtype, device_type: str) -> int:
    """Rows of a tile: as many as the budget of bytes holds, then evened out so that all tiles are about as large."""
    budget = TILE_BYTES.get(device_type, TILE_BYTES_ACCELERATOR)
    most = max(budget // (columns * dtype.itemsize) // ROW_MULTIPLE, 1) * ROW_MULTIPLE
    tiles = max(-(-N // most), 1)
    return min(most, -(-N // (tiles * 8)) * 8)


class QTargetFunction(torch.autograd.Function):
    """Sum of the loss over N labelled tokens, and `TokenResults`; gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job, head: Head, wants: Wants):
        ctx.scale, ctx.dtypes = head.scale, [None if x is None else x.dtype for x in (hidden, weight, bias)]
        compute = head.weight.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            results, gradients = evaluate(job, hidden.to(compute), head, wants)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*results)
        ctx.set_materialize_grads(False)  # zeros for each of the eight results would be eight launches for nothing
        return results.token_loss.sum(dtype=wide(compute)), *results

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor | None, *_):
        if upstream is None:
            return None, None, None, None, None, None
        factor = upstream * ctx.scale
        kept = graph_is_kept()
        scaled = (
            None if g is None else scaled_gradient(g, factor, dtype, in_place=not kept)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None


def scaled_gradient(gradient: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    """`factor * gradient` as `dtype`; in place where no second backward pass can ask for the gradient again."""
    out = gradient if in_place and gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor, out=out)


def graph_is_kept() -> bool:
    """Whether a second backward pass over the same graph may follow the running one (retain_graph=True)."""
    ask = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()
