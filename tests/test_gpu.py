"""What only a GPU can say: parity and reproducibility at the size of a real head, memory, and no waiting."""

import pytest
import torch
from test_loss import TARGETS, extras

from trl_qtarget import ProjectedLogits, build, qtarget_loss, reference_loss
from trl_qtarget.loss.fused import LabelCount


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
N, V, D, D_T = 4096, 151_936, 512, 640


def problem(dtype, n=N):
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, device="cuda")

    labels = torch.randint(V, (n,), generator=g, device="cuda")
    labels[::7] = -100
    return {
        "hidden": normal(n, D).to(dtype).requires_grad_(),
        "weight": (normal(V, D) * D**-0.5 * 3).to(dtype).requires_grad_(),
        "labels": labels,
        "teacher": ProjectedLogits(normal(n, D_T).to(dtype), (normal(V, D_T) * D_T**-0.5 * 3).to(dtype)),
        "extras": {
            "reference_log_p_y": -normal(n).abs() - 0.1,
            "token_weight": (normal(n) > 0).double(),
            "trajectory": torch.arange(n, device="cuda") // 64,
        },
    }


def fused(c, target, more, **kwargs):
    out = qtarget_loss(c["hidden"], c["weight"], c["labels"], target, teacher=c["teacher"], **more, **kwargs)
    return out, *torch.autograd.grad(out.loss, (c["hidden"], c["weight"]))


@pytest.mark.parametrize(("name", "kwargs"), TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parity_at_full_size(name, kwargs, dtype):
    """Both gradients against the specification, over several tiles; as many tokens as its float64 logits allow."""
    c = problem(dtype, 768)
    target, more = build(name, **kwargs), extras(name, c)
    out, *gradients = fused(c, target, more, chunk_size=256)
    leaves = [c[name].detach().double().requires_grad_() for name in ("hidden", "weight")]
    t = c["teacher"]
    loss = reference_loss(
        leaves[0] @ leaves[1].T, c["labels"], target, t.hidden.double() @ t.weight.double().T, **more
    )
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    for gradient, expected in zip(gradients, torch.autograd.grad(loss, leaves), strict=True):
        assert (gradient.double() - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-3)
    torch.testing.assert_close(out.loss.double(), loss, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["dft", "target_sft"])
def test_the_same_bits_every_time_and_no_logits_of_the_batch(name):
    c = problem(torch.bfloat16)
    first = fused(c, build(name), {})
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    again = fused(c, build(name), {})
    peak = torch.cuda.max_memory_allocated() - before
    assert all(torch.equal(a, b) for a, b in zip(first[1:], again[1:], strict=True))
    assert torch.equal(first[0].token_loss, again[0].token_loss)
    assert peak < 4 * V * D * 2 + 2**31  # the gradient of the head, wide and cast, and a tile with its own gradient


@pytest.mark.parametrize("name", ["dft", "label_smoothing", "target_sft"])
def test_no_step_waits_for_the_device(name):
    """torch raises on whatever synchronises. The number of labels travels ahead, as the trainer lets it."""
    c = problem(torch.bfloat16)
    target = build(name)
    fused(c, target, {})  # compiles the kernels
    labelled = LabelCount(c["labels"])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused(c, target, {}, labelled=labelled)
    finally:
        torch.cuda.set_sync_debug_mode("default")
