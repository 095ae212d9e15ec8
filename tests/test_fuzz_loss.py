"""Whatever `qtarget_loss` is given, its result is the specified one, or a ValueError says which argument is wrong.

2,000 derandomized cases: `pytest -m slow tests/test_fuzz_loss.py`.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_qtarget import PRESETS, ProjectedLogits, TopKLogits, build, qtarget_loss, reference_loss


pytestmark = pytest.mark.slow
ARGUMENTS = (
    "labels",
    "teacher",
    "reference",
    "token_weight",
    "trust",
    "trajectory",
    "hidden",
    "chunk_size",
    "softcap",
)
COLUMNS = ("reference_log_p_y", "reference_mass", "token_weight", "trust", "trajectory")


def column(name, n, generator):
    if name == "trajectory":
        return torch.randint(3, (n,), generator=generator)
    x = torch.rand(n, dtype=torch.float64, generator=generator).clamp(0.01, 0.99)
    return x.log() if name == "reference_log_p_y" else x


@settings(max_examples=2000, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])
@given(data=st.data())
def test_the_loss_is_the_specified_one_or_names_the_argument(data):
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    n, V, D = draw(st.integers(0, 7)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    spread = draw(st.sampled_from([0.0, 0.3, 3.0, 300.0]))
    target = build(draw(st.sampled_from(sorted(PRESETS))))

    def normal(*shape):
        return spread * torch.randn(*shape, dtype=torch.float64, generator=generator)

    hidden, weight = normal(n, D).requires_grad_(), normal(V, D)
    strange = draw(st.sampled_from([None, None, None, V, -1, -101]))
    labels = torch.randint(V, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < 0.3] = -100
    if n and strange is not None:
        labels[draw(st.integers(0, n - 1))] = strange
    columns = {name: column(name, n, generator) for name in COLUMNS if draw(st.booleans())}
    softcap = draw(st.sampled_from([None, None, 5.0, 0.0]))
    kind = draw(st.sampled_from(["none", "dense", "top-K", "twice", "padded"]))
    teacher, taught = None, None
    if kind == "dense":
        teacher = ProjectedLogits(normal(n, 2), normal(V, 2))
        taught = teacher.hidden @ teacher.weight.T
    elif kind != "none":
        k = draw(st.integers(1, V))
        top = normal(n, V).log_softmax(-1).topk(k)
        ids, log_probs = top.indices, top.values
        if kind == "twice":
            ids, log_probs = torch.cat([ids, ids], -1), torch.cat([log_probs, log_probs], -1) - 1
        if kind == "padded":
            ids = torch.cat([ids, torch.zeros(n, 2, dtype=torch.long)], -1)
            log_probs = torch.cat([log_probs, torch.full((n, 2), -torch.inf, dtype=torch.float64)], -1)
        teacher = TopKLogits(ids, log_probs)
    chunk_size = draw(st.sampled_from([None, 1, 2, 0]))
    refused = None
    try:
        out = qtarget_loss(
            hidden, weight, labels, target, teacher=teacher, softcap=softcap, chunk_size=chunk_size, **columns
        )
    except ValueError as mistake:
        refused = str(mistake)
    if refused is not None:
        assert any(name in refused for name in ARGUMENTS), refused
        return
    assert ((labels == -100) | ((labels >= 0) & (labels < V))).all()
    z = hidden @ weight.T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    if isinstance(teacher, TopKLogits):
        taught = teacher.dense(z.detach())
    expected = reference_loss(z, labels, target, taught, **columns)
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=1e-7)
    (ours,), (theirs,) = (torch.autograd.grad(x, hidden) for x in (out.loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
