"""Triton's tiles: their numbers under its interpreter, and their compilation for devices that need not be here."""

import os
import subprocess
import sys
from pathlib import Path

import compare
import pytest
import torch
from test_loss import PLANE, TARGETS, TAUGHT, both, case, close, dense, extras, sparse_as_dense, top_k
from torch.utils._python_dispatch import TorchDispatchMode

from trl_qtarget import PRESETS, ProjectedLogits, Target, build, qtarget_loss, reference_loss
from trl_qtarget.loss import chunked
from trl_qtarget.loss.backends import tiles_for
from trl_qtarget.loss.fused import LabelCount
from trl_qtarget.theory.reference import require_tokenwise


pytest.importorskip("triton")
TILES, SPARSE_TILES = "triton_tiles.py", "sparse.py, TritonSparseRows in loss/triton_tiles.py"
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")


@on_cpu
@pytest.mark.parametrize(("name", "kwargs"), TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [1, 31, 1537])
@pytest.mark.parametrize("n", [0, 1, 65])
def test_every_preset_equals_the_specification(name, kwargs, dtype, V, n):
    """In bfloat16 products round, so there the twin that rounds alike is the measure, and the reference of that."""
    c = case(n=n, V=V, dtype=dtype, bias=True, spread=0.5)
    target, more = build(name, **kwargs), extras(name, c)
    chunk = None if dtype == torch.bfloat16 else 40
    _, fused, reference = both(c, target, more, backend="triton", chunk_size=chunk)
    if dtype == torch.float32:
        close(fused, reference, name, TILES)
    else:
        close(fused, both(c, target, more, backend="torch")[1], name, TILES, rtol=1e-2, atol=1e-3)


@on_cpu
@pytest.mark.parametrize("residual", PLANE, ids=str)
def test_every_residual_of_the_plane_equals_the_specification(residual):
    _, fused, reference = both(case(), Target(trust=0.4, residual=residual), backend="triton")
    close(fused, reference, str(residual), TILES)


@on_cpu
@pytest.mark.parametrize("name", TAUGHT)
@pytest.mark.parametrize(("V", "k"), [(67, 1), (67, 20), (67, 67), (1537, 20), (1537, 1537), (31, 20), (1, 1)])
def test_sparse_teachers(name, V, k):
    c = case(V=V, masked=False, spread=0.5)
    sparse = top_k(c, k)
    c["labels"][0] = sparse.ids[0, 0]
    z = dense(c["hidden"], c["weight"])
    loss = reference_loss(z, c["labels"], build(name), sparse_as_dense(c, sparse, z))
    fused = both(c, build(name), teacher=sparse, backend="triton")[1]
    close(fused, (loss, *torch.autograd.grad(loss, (c["hidden"], c["weight"]))), name, SPARSE_TILES)


@on_cpu
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ["dft", "target_sft", "label_smoothing"])
def test_a_gradient_in_the_type_of_its_products(name, sparse, backend, monkeypatch):
    """As on a GPU with bfloat16 weights: the tile's gradient is written once, rounded, beside the logits."""
    c = case(n=21, V=257, dtype=torch.bfloat16, spread=0.3)
    options = {"backend": backend, "teacher": top_k(c, 9) if sparse else None, "softcap": 5.0}
    wide = both(c, build(name), **options)[1]
    monkeypatch.setattr(chunked, "gradient_dtype", lambda hidden: torch.bfloat16)
    close(both(c, build(name), **options)[1], wide, name, f"{backend}_tiles.py", rtol=2e-2, atol=2e-2)


class Waits(TorchDispatchMode):
    """The operators that make the host wait for a device."""

    FORBIDDEN = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._unique2", "aten.is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += [str(func)] if str(func).startswith(self.FORBIDDEN) else []
        return func(*args, **(kwargs or {}))


@on_cpu
@pytest.mark.parametrize("name", [name for name in PRESETS if not build(name).whole_batch])
@pytest.mark.parametrize("sparse", [False, True])
def test_no_step_waits_for_the_device(name, sparse):
    if sparse and name not in TAUGHT:
        return
    c, target = case(), build(name)
    require_tokenwise(target)  # on the host, once for each target
    with Waits() as waits:
        labelled = LabelCount(c["labels"])
        launched = len(waits.seen)
        both_ = {"teacher": top_k(c, 5) if sparse else c["teacher"], **extras(name, c)}
        count = int(labelled)  # an event on a GPU
        waits.seen.clear()
        out = qtarget_loss(c["hidden"], c["weight"], c["labels"], target, backend="triton", labelled=count, **both_)
        (out.loss / 7).backward()
    assert not launched
    assert waits.seen == []


@on_cpu
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ["nll", "target_sft", "idft", "eaft"])
def test_softcap_scale_and_an_impossible_column(name, sparse):
    c = case(bias=True, spread=2.0)
    t = c["teacher"]
    c["teacher"] = ProjectedLogits(t.hidden, t.weight, torch.linspace(-1, 1, 67), logit_scale=0.3, softcap=5.0)
    options = {"scale": 0.7, "softcap": 3.0, "teacher": top_k(c, 9) if sparse else None}
    ours, theirs = (both(c, build(name), backend=b, **options)[1] for b in ("triton", "torch"))
    close(ours, theirs, name, TILES)
    c["bias"] = c["bias"].detach().index_fill(0, torch.tensor([66]), -torch.inf).requires_grad_()
    c["labels"] = c["labels"].clamp(max=65)
    options = {"teacher": options["teacher"], "softcap": 3.0}
    ours, theirs = (both(c, build(name), backend=b, **options)[1] for b in ("triton", "torch"))
    close(ours, theirs, name, TILES)


@on_cpu
@pytest.mark.parametrize("name", ["dft", "target_sft", "sft_kl", "eaft", "deft"])
@pytest.mark.parametrize("sparse", [False, True])
def test_every_per_token_result_equals_that_of_the_torch_tiles(name, sparse):
    c = case(n=21, spread=1.5)
    teacher = top_k(c, 5) if sparse else None
    ours, theirs = (both(c, build(name), backend=b, teacher=teacher)[0] for b in ("triton", "torch"))
    for field in ("token_loss", "log_p_y", "trust", "entropy", "target_p_y", "moved", "grad_mass"):
        what, where = f"{field} of {name!r}", f"TokenResults in loss/chunked.py, the statistics in loss/{TILES}"
        compare.close(getattr(ours, field), getattr(theirs, field), what, where, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.is_top1, theirs.is_top1)


@on_cpu
def test_the_same_inputs_give_the_same_bits():
    c = case(n=21, V=1537)
    first, second = (both(c, build("target_sft"), backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert torch.equal(first[0].moved, second[0].moved)


def test_a_backend_that_cannot_run_is_said_in_one_sentence(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"Triton does not drive cpu devices\. Leave it at 'auto'"):
        tiles_for("triton", torch.device("cpu"))
    c = case()
    assert qtarget_loss(c["hidden"], c["weight"], c["labels"], build("nll")).loss.isfinite()


def test_the_kernels_compile_for_every_device_without_spilling():
    """A process of its own, as this one interprets. Spilled registers would go to memory in the innermost loop."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", Path(__file__).with_name("compile_tiles.py")],
        env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    lines = [line.split() for line in run.stdout.splitlines()]
    assert {line[2] for line in lines} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert all(int(line[4]) == 0 for line in lines)
