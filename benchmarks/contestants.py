"""The contestants of `benchmarks.kernel`: losses of hidden states and head, called forward and backward.

`CONTESTANTS[name](problem)` returns a function without arguments that leaves the gradients of `problem.hidden` and
`problem.weight` in their `.grad`, or raises ImportError with the reason why it cannot run here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_qtarget import ProjectedLogits, TopKLogits, build, qtarget_loss


@dataclass
class Problem:
    """Random inputs of the shapes of a real head: n labelled tokens, V columns, widths D and D_T."""

    hidden: Tensor  # (n, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (n,)
    teacher_hidden: Tensor  # (n, D_T)
    teacher_weight: Tensor  # (V, D_T)
    sparse: TopKLogits  # (n, K)

    @classmethod
    def draw(cls, n: int, V: int, D: int, D_T: int, dtype: torch.dtype, device: str, K: int = 64) -> Problem:
        g = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=device).to(dtype)

        ids = torch.rand(n, V, generator=g, device=device).topk(K).indices if n * V < 2**26 else None
        if ids is None:  # distinct without a random permutation of every row
            ids = (torch.randint(V, (n, 1), generator=g, device=device) + 997 * torch.arange(K, device=device)) % V
        log_probs = (normal(n, K).float().log_softmax(-1) - 0.1).contiguous()
        weight, teacher_weight = normal(V, D).mul_(D**-0.5 * 3), normal(V, D_T).mul_(D_T**-0.5 * 3)
        labels = torch.randint(V, (n,), generator=g, device=device)
        sparse = TopKLogits(ids, log_probs)
        problem = cls(normal(n, D), weight, labels, normal(n, D_T), teacher_weight, sparse)
        problem.hidden.requires_grad_()
        problem.weight.requires_grad_()
        return problem

    def teacher_logits(self, teacher: str | None, logits: Tensor) -> Tensor | None:  # (n, V) float64
        """The teacher's logits of every column; a sparse teacher has the student's shape outside its ids."""
        if teacher is None:
            return None
        if teacher == "dense":
            return self.teacher_hidden.double() @ self.teacher_weight.double().T
        return self.sparse.dense(logits)

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def ours(loss: str, teacher: str | None = None) -> Callable[[Problem], Callable[[], None]]:
    def prepare(p: Problem) -> Callable[[], None]:
        target = build(loss)
        taught: Any = None
        if teacher is not None:
            taught = p.sparse if teacher == "sparse" else ProjectedLogits(p.teacher_hidden, p.teacher_weight)
        return lambda: qtarget_loss(p.hidden, p.weight, p.labels, target, teacher=taught).loss.backward()

    return prepare


def plain(p: Problem) -> Callable[[], None]:
    """Logits of all tokens, and torch's cross entropy."""

    def run() -> None:
        logits = torch.nn.functional.linear(p.hidden, p.weight)
        torch.nn.functional.cross_entropy(logits.float(), p.labels, reduction="sum").backward()

    return run


def trl_nll(p: Problem) -> Callable[[], None]:
    """SFTTrainer's head, with the statistics it asks for."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction as Function
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    fields = ("log_probs", "entropy", "is_top1")
    return lambda: (
        -Function.apply(p.hidden, p.weight, None, p.labels, 1.0, CHUNK, None, 1.0, fields)[0].sum()
    ).backward()


def trl_divergence(p: Problem) -> Callable[[], None]:
    """DistillationTrainer's forward KL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction as Function

    return lambda: (
        Function.apply(p.hidden, p.weight, None, p.teacher_hidden, p.teacher_weight, None, 0.0)[0].sum().backward()
    )


def liger_nll(p: Problem) -> Callable[[], None]:
    if not p.hidden.is_cuda:
        raise ImportError("Liger's kernels need a GPU")
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function

    return lambda: Function.apply(p.hidden, p.weight, p.labels, None, None, -100, 0.0, 0.0, "sum")[0].backward()


def liger_jsd(p: Problem) -> Callable[[], None]:
    """Its Jensen-Shannon divergence at beta = 0, the forward KL; a mean, made a sum."""
    if not p.hidden.is_cuda:
        raise ImportError("Liger's kernels need a GPU")
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction as Function

    n = len(p.hidden)
    return lambda: (
        Function.apply(p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, p.labels, 0.0, -100, 1.0) * n
    ).backward()


def cce(p: Problem) -> Callable[[], None]:
    if not p.hidden.is_cuda:
        raise ImportError("cut cross entropy needs a GPU")
    from cut_cross_entropy import linear_cross_entropy

    return lambda: linear_cross_entropy(p.hidden, p.weight, p.labels, reduction="sum").backward()


def products(with_teacher: bool) -> Callable[[Problem], Callable[[], None]]:
    """The floor: the matrix products alone, three or four, into memory that is already allocated."""

    def prepare(p: Problem) -> Callable[[], None]:
        hidden, weight = p.hidden.detach(), p.weight.detach()
        rows = min(len(hidden), 256)
        tile = hidden.new_empty(rows, len(weight))
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

        def run() -> None:
            for start in range(0, len(hidden), rows):
                part = slice(start, min(start + rows, len(hidden)))
                z = tile[: part.stop - part.start]
                if with_teacher:
                    torch.mm(p.teacher_hidden[part], p.teacher_weight.t(), out=z)
                torch.mm(hidden[part], weight.t(), out=z)
                torch.mm(z, weight, out=grad_hidden[part])
                torch.addmm(grad_weight, z.t(), hidden[part], beta=0 if start == 0 else 1, out=grad_weight)

        return run

    return prepare


CONTESTANTS: dict[str, Callable[[Problem], Callable[[], None]]] = {
    "3 products": products(False),
    "4 products": products(True),
    "nll": ours("nll"),
    "dft": ours("dft"),
    "label_smoothing": ours("label_smoothing"),
    "gem": ours("gem"),
    "target_sft K=64": ours("target_sft", "sparse"),
    "target_sft dense": ours("target_sft", "dense"),
    "kd dense": ours("kd", "dense"),
    "TRL nll": trl_nll,
    "TRL divergence": trl_divergence,
    "Liger nll": liger_nll,
    "Liger JSD": liger_jsd,
    "CCE nll": cce,
    "plain logits": plain,
}
# Whose gradient a contestant's must equal before it is timed: a loss of the float64 specification
EXPECTED = {
    "nll": ("nll", None), "dft": ("dft", None), "label_smoothing": ("label_smoothing", None), "gem": ("gem", None),
    "target_sft K=64": ("target_sft", "sparse"), "target_sft dense": ("target_sft", "dense"),
    "kd dense": ("kd", "dense"),
    "TRL nll": ("nll", None), "TRL divergence": ("kd", "dense"), "plain logits": ("nll", None),
    "Liger nll": ("nll", None), "Liger JSD": ("kd", "dense"), "CCE nll": ("nll", None),
}  # fmt: skip
