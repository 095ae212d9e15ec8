"""Triton's tiles: their numbers under its interpreter, and their compilation for devices that need not be here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_loss import TARGETS, TAUGHT, both, case, close, dense, extras, sparse_as_dense, top_k

from trl_qtarget import ProjectedLogits, build, qtarget_loss, reference_loss
from trl_qtarget.kernels import tiles_for


pytest.importorskip("triton")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")


@on_cpu
@pytest.mark.parametrize(("name", "kwargs"), TARGETS)
@pytest.mark.parametrize("V", [1, 31, 1537])
def test_every_preset_equals_the_specification(name, kwargs, V):
    c = case(n=9, V=V, bias=True, spread=0.5)
    _, fused, reference = both(c, build(name, **kwargs), extras(name, c), backend="triton", chunk_size=4)
    close(fused, reference)


@on_cpu
@pytest.mark.parametrize("n", [0, 1, 65])
@pytest.mark.parametrize("name", ["dft", "target_sft", "label_smoothing"])
def test_any_number_of_rows(name, n):
    c = case(n=n, V=31)
    _, fused, reference = both(c, build(name), backend="triton")
    close(fused, reference)


@on_cpu
@pytest.mark.parametrize("name", ["dft", "target_sft"])
def test_half_precision_inputs(name):
    c = case(n=9, V=257, dtype=torch.bfloat16, spread=0.3)
    triton, torch_ = (both(c, build(name), backend=b)[1] for b in ("triton", "torch"))
    close(triton, torch_, rtol=2e-2, atol=2e-2)


@on_cpu
@pytest.mark.parametrize("name", TAUGHT)
@pytest.mark.parametrize("k", [1, 20, 67])
def test_sparse_teachers(name, k):
    c = case(masked=False, spread=0.5)
    sparse = top_k(c, k)
    c["labels"][0] = sparse.ids[0, 0]
    z = dense(c["hidden"], c["weight"])
    loss = reference_loss(z, c["labels"], build(name), sparse_as_dense(c, sparse, z))
    fused = both(c, build(name), teacher=sparse, backend="triton")[1]
    close(fused, (loss, *torch.autograd.grad(loss, (c["hidden"], c["weight"]))))


@on_cpu
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ["nll", "target_sft", "idft", "eaft"])
def test_softcap_scale_and_an_impossible_column(name, sparse):
    c = case(bias=True, spread=2.0)
    t = c["teacher"]
    c["teacher"] = ProjectedLogits(t.hidden, t.weight, torch.linspace(-1, 1, 67), logit_scale=0.3, softcap=5.0)
    options = {"scale": 0.7, "softcap": 3.0, "teacher": top_k(c, 9) if sparse else None}
    close(both(c, build(name), backend="triton", **options)[1], both(c, build(name), backend="torch", **options)[1])
    c["bias"] = c["bias"].detach().index_fill(0, torch.tensor([66]), -torch.inf).requires_grad_()
    c["labels"] = c["labels"].clamp(max=65)
    options = {"teacher": options["teacher"]}
    close(both(c, build(name), backend="triton", **options)[1], both(c, build(name), backend="torch", **options)[1])


@on_cpu
@pytest.mark.parametrize("name", ["dft", "target_sft", "sft_kl", "eaft", "deft"])
@pytest.mark.parametrize("sparse", [False, True])
def test_every_per_token_result_equals_that_of_the_torch_tiles(name, sparse):
    c = case(n=21, spread=1.5)
    teacher = top_k(c, 5) if sparse else None
    ours, theirs = (both(c, build(name), backend=b, teacher=teacher)[0] for b in ("triton", "torch"))
    for field in ("token_loss", "log_p_y", "trust", "entropy", "target_p_y", "moved", "grad_mass"):
        torch.testing.assert_close(getattr(ours, field), getattr(theirs, field), rtol=1e-4, atol=1e-5, msg=field)
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
