"""The walk over labelled tokens: project a tile, read its rows, weigh them, write the gradient over it, multiply.

    stage                    writes
    project student          (n, V) logits tile, and a second one for a dense teacher
    per block of rows        statistics -> the target's weights -> the gradient, over the logits
    two products             (n, D) rows of the hidden gradient; adds to the (V, D) head gradient

Everything happens in the forward pass, while the tile exists: three products for a loss of label trust, four with a
dense teacher, and none is done twice. The backward pass multiplies by the upstream scalar. What a caller does not want
a gradient of costs neither product nor buffer. N: labelled tokens, n: tokens of a tile, D: width, V: columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..theory.target import RowWeights, Target, Tokens
from .products import Head, add_weight_gradient, gradient_dtype, hidden_gradient, project, wide
from .scratch import scratch
from .teacher import ProjectedLogits, TeacherLogits, TopKLogits


TILE_BYTES = {"cpu": 5 * 2**25}  # logits of one tile, of both models; elsewhere:
TILE_BYTES_ACCELERATOR = 2**30  # some 1,700 rows: below a thousand, adding to the (V, D) gradient waits for memory
ROW_MULTIPLE = 128  # of rows in a tile: a product of fewer rows does not fill the machine

COLUMNS = ("token_loss", "log_p_y", "trust", "entropy", "is_top1", "target_p_y", "moved", "grad_mass")


@dataclass
class Job:
    """One evaluation of the loss on N labelled tokens: its constants and, as it runs, its per-token results."""

    target: Target
    tiles: ModuleType
    labels: Tensor  # (N,)
    teacher: TeacherLogits | None = None
    reference_log_p_y: Tensor | None = None  # (N,)
    reference_mass: Tensor | None = None  # (N,)
    token_weight: Tensor | None = None  # (N,)
    trust: Tensor | None = None  # (N,) NaN where the target's own is meant
    trajectory: Tensor | None = None  # (N,)
    chunk_size: int | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)  # results, (N,) each
    whole_batch: tuple[RowWeights, Tensor] | None = None  # weights and losses, where all tokens decide them

    def run(self, hidden: Tensor, head: Head, wants: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
        """Fill `columns`, and return the wanted gradients of (hidden, weight, bias), wide and without `head.scale`."""
        dtype, device = wide(hidden.dtype), hidden.device
        self._allocate(dtype, device)
        if self.target.whole_batch and self.whole_batch is None:
            self._weigh_whole_batch(hidden, head)
        N, (V, D) = len(hidden), head.weight.shape
        wants_hidden, wants_weight, wants_bias = wants
        grad_hidden = hidden.new_empty(N, D, dtype=dtype) if wants_hidden else None
        empty = hidden.new_empty if N else hidden.new_zeros
        grad_weight = empty(V, D, dtype=dtype) if wants_weight else None
        grad_bias = hidden.new_zeros(V, dtype=dtype) if wants_bias else None
        dense = isinstance(self.teacher, ProjectedLogits)
        size = rows_per_tile(N, V * (1 + dense), dtype, device.type) if self.chunk_size is None else self.chunk_size
        size = min(size, N)
        tile = scratch("student", (size, V), hidden, dtype)
        teacher_tile = scratch("teacher", (size, V), hidden, dtype) if dense else None
        factor = gradient_dtype(hidden)
        gradient_tile = tile if factor == dtype or not any(wants) else scratch("gradient", (size, V), hidden, factor)
        for start in range(0, N, max(size, 1)):
            part = slice(start, min(start + size, N))
            n = part.stop - start
            z = project(hidden[part], head, tile[:n])
            g = gradient_tile[:n]
            self._walk(z, self._project_teacher(part, teacher_tile), g, part, head.softcap, any(wants))
            if grad_hidden is not None:
                hidden_gradient(g, head.weight, grad_hidden[part])
            if grad_weight is not None:
                add_weight_gradient(g, hidden[part], grad_weight, first=start == 0)
            if grad_bias is not None:
                grad_bias += g.sum(0, dtype=dtype)
        return grad_hidden, grad_weight, grad_bias

    def _project_teacher(self, part: slice, tile: Tensor | None) -> Tensor | tuple[Tensor, Tensor] | None:
        if self.teacher is None:
            return None
        teacher = self.teacher.take(part)
        if isinstance(teacher, TopKLogits):
            return teacher.ids, teacher.log_probs
        assert tile is not None
        common = min(tile.shape[-1], len(teacher.weight))
        t = tile[: part.stop - part.start]
        if common == tile.shape[-1]:
            project(teacher.hidden, teacher.head.first(common), t)
        else:
            t[:, :common] = project(teacher.hidden, teacher.head, t.new_empty(len(t), common))
            t[:, common:] = -torch.inf
        return t

    def _walk(self, z: Tensor, teacher, g: Tensor, part: slice, softcap: float | None, wants_gradient: bool) -> None:
        step = self.tiles.block_rows(z.shape[-1], z.dtype, z.device)
        for first in range(0, len(z), step):
            block = slice(first, min(first + step, len(z)))
            at = slice(part.start + block.start, part.start + block.stop)
            taught = tuple(x[block] for x in teacher) if isinstance(teacher, tuple) else teacher
            if isinstance(taught, Tensor) and isinstance(self.teacher, ProjectedLogits):
                taught = self.tiles.cap_(taught[block], self.teacher.softcap)
            rows = self.tiles.rows(z[block], self.labels[at], self.target.residual, taught, softcap)
            self._weigh(rows, at, g[block] if wants_gradient else None)

    def _weigh(self, rows, at: slice, gradient: Tensor | None) -> None:
        """Results of one block, and its gradient, which may take the place of the logits."""
        tokens = self._tokens(rows.log_p_y, rows, at)
        target = self.target
        if self.whole_batch is None:
            weights = target.weights(tokens)
            loss = target.token_loss(weights, tokens)
        else:
            all_weights, all_losses = self.whole_batch
            weights, loss = RowWeights(*(w[at] for w in all_weights)), all_losses[at]
        results = {
            "token_loss": loss,
            "log_p_y": tokens.log_p_y,
            "trust": weights.trust,
            "entropy": rows.entropy,
            "is_top1": rows.is_top1,
            "target_p_y": target.target_p_y(weights, tokens),
        }
        # a gradient nobody wants is still written where it takes a pass over the row to say how far the target moved
        norm = None
        if gradient is not None or not target.residual.is_student:
            out = rows.z if gradient is None else gradient
            norm = rows.write_gradient(weights.label.to(rows.z), weights.residual.to(rows.z), out)
        scale = weights.scale.abs()
        if norm is None:
            results["moved"] = weights.trust.abs() * -tokens.log_p_y.expm1()
            results["grad_mass"] = scale * results["moved"]
        else:
            results["grad_mass"] = norm.to(scale) / 2
            results["moved"] = (results["grad_mass"] / scale).where(scale > 0, 0)
        for name, value in results.items():
            self.columns[name][at] = value.to(self.columns[name].dtype)

    def _tokens(self, log_p_y: Tensor, rows, at: slice) -> Tokens:
        real = torch.float32 if log_p_y.device.type == "mps" else torch.float64

        def part(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[at].to(real)

        return Tokens(
            log_p_y=log_p_y.to(real),
            rows=rows,
            labels=self.labels[at],
            token_weight=part(self.token_weight),
            given_reference=part(self.reference_log_p_y),
            given_mass=part(self.reference_mass),
            given_trust=part(self.trust),
            trajectory=None if self.trajectory is None else self.trajectory[at],
        )

    def _weigh_whole_batch(self, hidden: Tensor, head: Head) -> None:
        """One extra pass of log p_y, for the rules that look at all tokens before they weigh the first."""
        first = replace(self, target=Target(), teacher=None, token_weight=None, trust=None, columns={})
        first.run(hidden, head, (False, False, False))
        tokens = self._tokens(first.columns["log_p_y"], None, slice(None))
        weights = self.target.weights(tokens)
        self.whole_batch = weights, self.target.token_loss(weights, tokens)

    def _allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        for name in COLUMNS:
            kind = torch.bool if name == "is_top1" else dtype
            self.columns[name] = torch.zeros(len(self.labels), dtype=kind, device=device)


def rows_per_tile(N: int, columns: int, dtype: torch.dtype, device_type: str) -> int:
    """Rows of a tile from a budget of bytes, a multiple of 128, evenly shared so that the last tile is no stump."""
    budget = TILE_BYTES.get(device_type, TILE_BYTES_ACCELERATOR)
    most = max(budget // (columns * dtype.itemsize) // ROW_MULTIPLE, 1) * ROW_MULTIPLE
    tiles = max(-(-N // most), 1)
    return min(most, -(-N // (tiles * 8)) * 8)


class QTargetFunction(torch.autograd.Function):
    """Sum of the loss over N labelled tokens; its gradients are formed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job, head: Head, wants) -> Tensor:
        ctx.scale, ctx.dtypes = head.scale, [None if x is None else x.dtype for x in (hidden, weight, bias)]
        compute = head.weight.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = job.run(hidden.to(compute), head, wants)
        ctx.save_for_backward(*gradients)
        return job.columns["token_loss"].sum(dtype=wide(compute))

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        factor = upstream * ctx.scale
        kept = graph_is_kept()
        scaled = (
            None if g is None else scaled_gradient(g, factor, dtype, in_place=not kept)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None


def scaled_gradient(gradient: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    """`factor * gradient` as `dtype`, over the gradient itself where that will not be asked for again."""
    out = gradient if in_place and gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor, out=out)


def graph_is_kept() -> bool:
    """Whether the running backward pass may be followed by another over the same graph (retain_graph=True)."""
    ask = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()
