"""Row kernels in Triton, twins of `torch_tiles`: one read of the logits for statistics, one for the gradient.

    statistics_kernel   one program a row walks its columns once and carries sums relative to the running maximum
    gradient_kernel     programs over (row, block of columns) recompute p and pi~ from those sums, write the gradient
                        over the logits or, in the type of the products that follow, into a second tile, and store
                        one partial L1 norm each: without atomics results repeat bit for bit

A top-K teacher needs no further kernel: the logits of its K columns become -inf, the kernels see an ordinary row, and
torch puts K numbers a row back. Statistics that few losses read (top-20 entropy, rank mass, the teacher's normaliser)
are computed by torch on the same tile.
"""

from __future__ import annotations

from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..theory.target import STUDENT, Residual
from . import torch_tiles
from .products import precise
from .sparse import SparsePool, SparseStatistics
from .teacher import DenseTile, TeacherTile, TopKLogits
from .torch_tiles import BELOW_ALL, RowStatistics, cap_, pick


BLOCK_V = 4096  # columns a program holds at once
NUM_WARPS = 8
STATISTICS = 9  # numbers a row: max, sum, dot, squares, the label's logit, and of the pool max, sum, z, dot


def block_rows(vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """All rows of a tile at once: Triton's programs divide the rows among themselves."""
    return 2**30


@triton.jit
def capped(z, softcap, HAS_SOFTCAP: tl.constexpr):
    """softcap * tanh(z / softcap), from exp of a negative number to avoid overflow; a masked column stays -inf."""
    if HAS_SOFTCAP:
        e = tl.exp(-2 * tl.abs(z) / softcap)
        t = (1 - e) / (1 + e)
        z = tl.where(z > float("-inf"), softcap * tl.where(z < 0, -t, t), z)
    return z


@triton.jit
def pool_logits(
    z, t_ptr, offset, inside, student, teacher,
    HAS_STUDENT: tl.constexpr, HAS_TEACHER: tl.constexpr,
):  # fmt: skip
    """student * z + teacher * t over the columns that both models can produce, -inf elsewhere."""
    possible = inside & (z > float("-inf"))
    r = tl.zeros_like(z)
    if HAS_TEACHER:
        t = tl.load(t_ptr + offset, mask=inside, other=float("-inf")).to(tl.float32)
        possible = possible & (t > float("-inf"))
        r += teacher * tl.where(possible, t, 0.0)
    if HAS_STUDENT:
        r += student * tl.where(possible, z, 0.0)
    return tl.where(possible, r, float("-inf"))


@triton.jit(do_not_specialize=["n"])  # the number of tokens changes with every batch
def statistics_kernel(
    z_ptr,  # (n, V)
    t_ptr,  # (n, V); without HAS_TEACHER it is not read
    y_ptr,  # (n,)
    out_ptr,  # (STATISTICS, n)
    stride_z, stride_t, n, V, student, teacher, softcap,
    HAS_POOL: tl.constexpr, HAS_STUDENT: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # row * stride overflows int32 from 14k rows of a 152k vocabulary
    y, z_y = tl.load(y_ptr + row), float("-inf")
    m, s, d, q = float("-inf"), 0.0, 0.0, 0.0  # max; sums of e, e * (z - max) and e^2, with e = exp(z - max)
    pm, ps, pz, pd = float("-inf"), 0.0, 0.0, 0.0  # the same for the pool r: sums of w, w * z and w * (r - max)
    for start in range(0, V, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        inside = columns < V
        z = tl.load(z_ptr + row * stride_z + columns, mask=inside, other=float("-inf")).to(tl.float32)
        z = tl.where(inside, capped(z, softcap, HAS_SOFTCAP), float("-inf"))
        possible = z > float("-inf")

        z_y = tl.maximum(z_y, tl.max(tl.where(columns == y, z, float("-inf")), 0))
        new = tl.maximum(m, tl.max(z, 0))
        safe = tl.where(new > float("-inf"), new, 0.0)
        shrink = tl.where(m > float("-inf"), tl.exp(m - safe), 0.0)
        shift = tl.where(m > float("-inf"), m - safe, 0.0)
        e = tl.exp(z - safe)
        d = shrink * (d + shift * s) + tl.sum(e * tl.where(possible, z - safe, 0.0), 0)
        s = shrink * s + tl.sum(e, 0)
        q = shrink * shrink * q + tl.sum(e * e, 0)
        m = new

        if HAS_POOL:
            r = pool_logits(z, t_ptr, row * stride_t + columns, inside, student, teacher, HAS_STUDENT, HAS_TEACHER)
            live = r > float("-inf")
            new_p = tl.maximum(pm, tl.max(r, 0))
            safe_p = tl.where(new_p > float("-inf"), new_p, 0.0)
            shrink_p = tl.where(pm > float("-inf"), tl.exp(pm - safe_p), 0.0)
            shift_p = tl.where(pm > float("-inf"), pm - safe_p, 0.0)
            w = tl.exp(r - safe_p)
            pd = shrink_p * (pd + shift_p * ps) + tl.sum(w * tl.where(live, r - safe_p, 0.0), 0)
            pz = shrink_p * pz + tl.sum(w * tl.where(live, z, 0.0), 0)
            ps = shrink_p * ps + tl.sum(w, 0)
            pm = new_p

    tl.store(out_ptr + 0 * n + row, m)
    tl.store(out_ptr + 1 * n + row, s)
    tl.store(out_ptr + 2 * n + row, d)
    tl.store(out_ptr + 3 * n + row, q)
    tl.store(out_ptr + 4 * n + row, z_y)
    tl.store(out_ptr + 5 * n + row, pm)
    tl.store(out_ptr + 6 * n + row, ps)
    tl.store(out_ptr + 7 * n + row, pz)
    tl.store(out_ptr + 8 * n + row, pd)


@triton.jit(do_not_specialize=["n"])
def gradient_kernel(
    z_ptr,  # (n, V) logits
    g_ptr,  # (n, V) the gradient; may be z_ptr
    t_ptr,  # (n, V); without HAS_TEACHER it is not read
    y_ptr,  # (n,)
    max_ptr, sum_ptr, pool_max_ptr, pool_sum_ptr,  # (n,) of the statistics
    student_weight_ptr, label_weight_ptr, pool_weight_ptr,  # (n,)
    norm_ptr,  # (blocks, n)
    stride_g, stride_z, stride_t, n, V, student, teacher, softcap,
    HAS_POOL: tl.constexpr, HAS_STUDENT: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = columns < V
    z = tl.load(z_ptr + row * stride_z + columns, mask=inside, other=float("-inf")).to(tl.float32)
    z = tl.where(inside, capped(z, softcap, HAS_SOFTCAP), float("-inf"))

    p = tl.exp(z - tl.load(max_ptr + row)) / tl.load(sum_ptr + row)
    g = tl.load(student_weight_ptr + row) * p
    if HAS_POOL:
        r = pool_logits(z, t_ptr, row * stride_t + columns, inside, student, teacher, HAS_STUDENT, HAS_TEACHER)
        pool = tl.exp(r - tl.load(pool_max_ptr + row)) / tl.load(pool_sum_ptr + row)
        g -= tl.load(pool_weight_ptr + row) * pool
    g -= tl.where(columns == tl.load(y_ptr + row), tl.load(label_weight_ptr + row), 0.0)
    tl.store(norm_ptr + block * n + row, tl.sum(tl.where(inside, tl.abs(g), 0.0), 0))
    if HAS_SOFTCAP:
        capped_part = tl.where(z > float("-inf"), z / softcap, 0.0)
        g *= 1 - capped_part * capped_part
    tl.store(g_ptr + row * stride_g + columns, g.to(g_ptr.dtype.element_ty), mask=inside)


def rows(
    z: Tensor,  # (n, V) logits before the softcap, overwritten
    labels: Tensor,  # (n,)
    residual: Residual,
    teacher: TeacherTile | None = None,
    softcap: float | None = None,
) -> RowStatistics:
    """Statistics of n rows and their gradient. Rows in float64 go to torch, since the kernels compute in float32."""
    if z.dtype == torch.float64:
        return torch_tiles.rows(z, labels, residual, teacher, softcap)
    if isinstance(teacher, TopKLogits) and not residual.is_student:
        return TritonSparseRows(z, labels, residual, teacher, softcap)
    taught = cap_(teacher.logits, teacher.softcap) if isinstance(teacher, DenseTile) else None
    return TritonRows(z, labels, residual, taught, softcap)


class TritonRows(RowStatistics):
    """Rows whose residual is the student or a pool over the whole vocabulary."""

    def __init__(self, z: Tensor, labels: Tensor, residual: Residual, teacher: Tensor | None, softcap: float | None):
        self.z, self.labels, self.residual, self.teacher, self.softcap = z, labels, residual, teacher, softcap
        self.pooled = not residual.is_student
        self.t = z if teacher is None else teacher  # without HAS_TEACHER no kernel reads it
        self._read()
        self.log_sum = self.sum.log()
        self.log_p_y = self.z_y - self.max - self.log_sum

    def _flags(self) -> dict:
        return {
            "HAS_POOL": self.pooled,
            "HAS_STUDENT": self.residual.student != 0,
            "HAS_TEACHER": self.pooled and self.residual.teacher != 0,
            "HAS_SOFTCAP": self.softcap is not None,
            "BLOCK_V": min(BLOCK_V, triton.next_power_of_2(self.z.shape[-1])),
            "num_warps": NUM_WARPS,
        }

    def _scalars(self, n: int) -> tuple:
        exponents = float(self.residual.student), float(self.residual.teacher)
        return self.z.stride(0), self.t.stride(0), n, self.z.shape[-1], *exponents, float(self.softcap or 1.0)

    def _read(self) -> None:
        n = len(self.z)
        aligned = -(-n // 4) * 4  # rows begin at multiples of 16 bytes: Triton compiles again for other pointers
        out = torch.empty(STATISTICS, aligned, dtype=torch.float32, device=self.z.device)
        if n:
            with torch.cuda.device_of(self.z):
                statistics_kernel[(n,)](self.z, self.t, self.labels, out, *self._scalars(aligned), **self._flags())
        self.max, self.sum, self.dot, self.squares, self.z_y = out[:5, :n]
        self.pool_max, self.pool_sum, self.pool_z, self.pool_dot = out[5:, :n]

    @property
    def is_top1(self) -> Tensor:
        return self.z_y == self.max

    @property
    def collision(self) -> Tensor:
        return self.squares / self.sum**2

    def top_evenness(self, k: int) -> Tensor:
        # the softcap keeps the order, so it is applied to the top logits alone
        return torch_tiles.evenness(cap_(self.z.topk(min(k, self.z.shape[-1])).values, self.softcap))

    @cached_property
    def residual_log_p_y(self) -> Tensor:
        if not self.pooled:
            return self.log_p_y
        r = self.residual.student * (self.log_p_y + self.log_sum + self.max) if self.residual.student else 0.0
        if self.residual.teacher:
            t = pick(self.teacher, self.labels).float()
            r = torch.where(t == -torch.inf, -torch.inf, r + self.residual.teacher * t)
        return r - self.pool_max - self.pool_sum.log()

    @cached_property
    def residual_nll(self) -> Tensor:
        return self.max + self.log_sum - self.pool_z / self.pool_sum if self.pooled else self.entropy

    @cached_property
    def residual_kl(self) -> Tensor:
        if not self.pooled:
            return torch.zeros_like(self.log_p_y)
        return (self.residual_nll + self.pool_dot / self.pool_sum - self.pool_sum.log()).clamp(min=0)

    def write_gradient(self, label_weight: Tensor, residual_weight: Tensor, out: Tensor) -> Tensor | None:
        student_weight = label_weight + residual_weight if self.pooled else label_weight
        norm = self._write(student_weight, label_weight, residual_weight, out)
        return norm if self.pooled else None

    def _write(self, student_weight: Tensor, label_weight: Tensor, pool_weight: Tensor, out: Tensor) -> Tensor:
        """Write the gradient into `out`, and return its L1 norm, whose partial sums are added in a fixed order."""
        n, V = self.z.shape
        flags = self._flags()
        blocks = triton.cdiv(V, flags["BLOCK_V"])
        norms = torch.empty(blocks, n, dtype=torch.float32, device=self.z.device)
        if n:
            with torch.cuda.device_of(self.z):
                gradient_kernel[(n, blocks)](
                    self.z, out, self.t, self.labels, self.max, self.sum, self.pool_max, self.pool_sum,
                    student_weight, label_weight, pool_weight, norms, out.stride(0), *self._scalars(n), **flags,
                )  # fmt: skip
        return norms.sum(0)


class TritonSparseRows(SparseStatistics, TritonRows):
    """Rows whose teacher is known at K ids: the logits of these columns become -inf, so kernels see the tail alone."""

    def __init__(self, z: Tensor, labels: Tensor, residual: Residual, teacher: TopKLogits, softcap: float | None):
        self.ids = teacher.ids
        self.raw_known = z.gather(-1, self.ids)
        self.capped_known = cap_(z.gather(-1, self.ids).float(), softcap)
        self.known = self.capped_known.masked_fill(teacher.log_probs == -torch.inf, -torch.inf)
        super().__init__(z.scatter_(-1, self.ids, -torch.inf), labels, STUDENT, None, softcap)
        log_p = precise(self.known - self.max[:, None]) - self.log_sum[:, None]
        tail_p = self.tail_sum / self.sum
        tail_p_log_p = self.tail_dot / self.sum - tail_p * self.log_sum
        self.sparse = SparsePool(teacher, log_p, tail_p, tail_p_log_p, labels, residual)

    def _read(self) -> None:
        """Sums of the tail and of the known columns, both relative to the maximum of the whole row."""
        super()._read()
        at_label = self.known.masked_fill(self.ids != self.labels[:, None], -torch.inf).amax(-1)
        self.z_y = torch.maximum(self.z_y, at_label)  # the kernel does not see a label among the ids
        top = torch.maximum(self.max, self.known.amax(-1))
        shift = (self.max - top).clamp(min=BELOW_ALL)  # the sums of an empty tail become zero
        shrink = shift.exp()
        known = (self.known - top[:, None]).clamp(min=BELOW_ALL)
        e = known.exp()
        self.tail_sum, self.tail_dot = shrink * self.sum, shrink * (self.dot + shift * self.sum)
        self.sum, self.dot = self.tail_sum + e.sum(-1), self.tail_dot + (e * known).sum(-1)
        self.squares = shrink**2 * self.squares + e.square().sum(-1)
        self.max = top

    def top_evenness(self, k: int) -> Tensor:
        whole = self.z.scatter(-1, self.ids, self.raw_known)
        return torch_tiles.evenness(cap_(whole.topk(min(k, whole.shape[-1])).values, self.softcap))

    def write_gradient(self, label_weight: Tensor, residual_weight: Tensor, out: Tensor) -> Tensor:
        gradient = self.sparse.gradient(label_weight, residual_weight, self.log_p_y)
        self._write(gradient.tail.to(label_weight), gradient.label.to(label_weight), residual_weight, out)
        known = gradient.known
        if self.softcap is not None:
            known = known * (1 - (self.capped_known / self.softcap).square())
        out.scatter_(-1, self.ids, known.to(out))
        return gradient.norm
