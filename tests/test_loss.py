"""The fused loss against the float64 specification: values, gradients, edges, memory."""

import math
from functools import cached_property

import compare
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from trl_qtarget import (
    PRESETS,
    STUDENT,
    TEACHER,
    UNIFORM,
    ProjectedLogits,
    Residual,
    Target,
    TopKLogits,
    build,
    qtarget_loss,
    reference_loss,
)
from trl_qtarget.loss import torch_tiles
from trl_qtarget.loss.backends import tiles_for
from trl_qtarget.loss.fused import LabelCount
from trl_qtarget.loss.per_token import PerToken, shifted, shifted_labels
from trl_qtarget.loss.scratch import KEPT
from trl_qtarget.loss.teacher import DenseTile
from trl_qtarget.theory.reference import DenseStatistics


SIGNATURE = {"prift": {"statistic": "mass"}, "target_sft": {"eta": 0.3}}  # 0.5 hides which exponent is whose
TARGETS = [pytest.param(name, {}, id=name) for name in PRESETS]
TARGETS += [pytest.param(name, kwargs, id=f"{name}, {kwargs}") for name, kwargs in SIGNATURE.items()]
PLANE = [Residual(1.0, 1.0), Residual(1.0, -0.5), Residual(0.2, 0.5)]  # points that no preset has
TAUGHT = ["kd", "kd_hybrid", "target_sft", "sft_kl", "asft"]


def case(n=13, V=67, D=8, D_T=5, V_T=None, dtype=torch.float32, seed=0, spread=1.0, masked=True, bias=False):
    """Inputs of one loss: hidden, weight, bias, labels, the teacher's, and the extras that some losses read."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    labels = torch.randint(V, (n,), generator=g)
    if masked and n > 2:
        labels[torch.randperm(n, generator=g)[: n // 4]] = -100
    V_T = V if V_T is None else V_T
    return {
        "hidden": (normal(n, D) * spread).to(dtype).requires_grad_(),
        "weight": normal(V, D).to(dtype).requires_grad_(),
        "bias": normal(V).to(dtype).requires_grad_() if bias else None,
        "labels": labels,
        "teacher": ProjectedLogits(normal(n, D_T).to(dtype), normal(V_T, D_T).to(dtype)),
        "extras": {
            "reference_log_p_y": -normal(n).abs() - 0.1,
            "token_weight": (normal(n) > 0).double(),
            "trajectory": 100 * (torch.arange(n) // 4),  # ids need not be counted from zero
        },
    }


def tiles_of(backend):
    """The module of kernels; skips the test where Triton is not installed."""
    if backend == "triton":
        pytest.importorskip("triton")
    return tiles_for(backend, torch.device("cpu"))


def extras(name, c):
    """Only what a loss reads: token_weight would multiply every other one."""
    needs = build(name).needs
    wanted = {"trajectory", *(("token_weight",) if "token_weight" in needs else ())}
    if {"reference_log_p_y", "snapshot"} & set(needs):
        wanted.add("reference_log_p_y")
    return {k: v for k, v in c["extras"].items() if k in wanted}


def dense(hidden, weight, bias=None, scale=1.0, softcap=None):
    z = hidden.double() @ weight.double().T
    z = (z if bias is None else z + bias.double()) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def both(c, target, more=None, teacher=None, scale=1.0, softcap=None, **kwargs):
    """(loss, gradients) of the fused loss and of the specification."""
    leaves = [x for x in (c["hidden"], c["weight"], c["bias"]) if x is not None]
    more = more or {}
    out = qtarget_loss(
        c["hidden"], c["weight"], c["labels"], target,
        teacher=c["teacher"] if teacher is None else teacher,
        bias=c["bias"], logit_scale=scale, softcap=softcap, **more, **kwargs,
    )  # fmt: skip
    fused = out.loss, *torch.autograd.grad(out.loss, leaves)
    t = c["teacher"]
    z = dense(c["hidden"], c["weight"], c["bias"], scale, softcap)
    loss = reference_loss(z, c["labels"], target, dense(t.hidden, t.weight, t.bias, t.logit_scale, t.softcap), **more)
    return out, fused, (loss, *torch.autograd.grad(loss, leaves))


# What `both` returns, in the order of the stages that compute it: the first that differs tells the stage
STAGES = {
    "loss": "the statistics in loss/{tiles}, token_loss in theory/target.py",
    "gradient of hidden": "write_gradient in loss/{tiles}, hidden_gradient in loss/products.py",
    "gradient of weight": "add_weight_gradient in loss/products.py",
    "gradient of bias": "Gradients.add in loss/chunked.py",
}


def close(fused, reference, name="the loss", tiles="torch_tiles.py", parts=tuple(STAGES), **tolerance):
    tolerance = tolerance or {"rtol": 2e-5, "atol": 2e-5}
    for part, (a, b) in zip(parts, zip(fused, reference, strict=True), strict=False):
        where = STAGES[part].format(tiles=tiles)
        compare.close(a.double(), b.double(), f"{part} of {name!r}", where, **tolerance)


@pytest.mark.parametrize(("name", "kwargs"), TARGETS)
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_every_preset_equals_the_specification(name, kwargs, spread):
    c = case(spread=spread, bias=True)
    _, fused, reference = both(c, build(name, **kwargs), extras(name, c), chunk_size=4)
    close(fused, reference, name)


@pytest.mark.parametrize(("name", "kwargs"), TARGETS)
def test_every_preset_in_double_precision(name, kwargs):
    c = case(dtype=torch.float64, V=31)
    _, fused, reference = both(c, build(name, **kwargs), extras(name, c))
    close(fused, reference, name, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("residual", PLANE, ids=str)
def test_every_residual_of_the_plane_equals_the_specification(residual):
    _, fused, reference = both(case(), Target(trust=0.4, residual=residual))
    close(fused, reference, str(residual))


@pytest.mark.parametrize("name", ["dft", "target_sft", "label_smoothing", "gem"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_at_most_twice_as_much_as_eager(name, dtype):
    c = case(n=40, V=257, D=32, dtype=dtype, spread=0.3)
    target = build(name)
    _, fused, reference = both(c, target)
    leaves = c["hidden"], c["weight"]
    t = c["teacher"]
    eager = reference_loss((c["hidden"] @ c["weight"].T).float(), c["labels"], target, (t.hidden @ t.weight.T).float())
    eager = eager, *torch.autograd.grad(eager, leaves)
    for a, b, exact in zip(fused, eager, reference, strict=True):
        error, allowed = (a.double() - exact).abs().max(), (b.double() - exact).abs().max()
        assert error <= 2 * allowed + 1e-5 * max(1, exact.abs().max())


def test_a_known_number_of_labels_changes_nothing():
    c = case(n=40)
    target = build("target_sft")
    plain, told = both(c, target)[1], both(c, target, labelled=LabelCount(c["labels"]))[1]
    assert all(torch.equal(a, b) for a, b in zip(plain, told, strict=True))


@pytest.mark.parametrize("name", ["nll", "target_sft", "label_smoothing"])
def test_scale_softcap_and_bias_of_both_models(name):
    c = case(bias=True, spread=2.0)
    t = c["teacher"]
    teacher = ProjectedLogits(t.hidden, t.weight, torch.linspace(-1, 1, 67), logit_scale=0.3, softcap=5.0)
    c["teacher"] = teacher
    _, fused, reference = both(c, build(name), scale=0.7, softcap=3.0)
    close(fused, reference, name)


@pytest.mark.parametrize("V_T", [50, 67, 90])
def test_a_teacher_with_other_columns_is_compared_over_the_common_ones(V_T):
    _, fused, reference = both(case(V_T=V_T), build("target_sft", eta=0.3))
    close(fused, reference, "target_sft")


@pytest.mark.parametrize("V_T", [50, 67, 90])
@pytest.mark.parametrize("name", ["prift", "psft"])
def test_a_reference_without_a_column_is_read_off_a_dense_teacher(name, V_T):
    c = case(V_T=V_T, masked=False)
    out, fused, reference = both(c, build(name))
    close(fused, reference, name)
    taught = dense(c["teacher"].hidden, c["teacher"].weight)[:, :67].softmax(-1)
    taught = torch.nn.functional.pad(taught, (0, 67 - taught.shape[-1]))
    if name == "prift":
        where = "_reads_label in loss/fused.py, teacher_log_p_y in loss/torch_tiles.py"
        compare.close(out.trust, torch_tiles.pick(taught, c["labels"]).float(), "trust of 'prift'", where)


@pytest.mark.parametrize("kind", ["dense", "dense with fewer columns", "top-K"])
@pytest.mark.parametrize("name", ["target_sft", "asft", "kd"])
def test_tiles_and_blocks_of_a_few_rows_add_up_to_the_whole(name, kind, monkeypatch):
    """A block is some thousand of these short rows unless its size is cut down."""
    c = case(n=29, V_T=50 if "fewer" in kind else None)
    teacher = top_k(c, 5) if kind == "top-K" else None
    told, whole, _ = both(c, build(name), teacher=teacher)
    monkeypatch.setattr(torch_tiles, "BLOCK_BYTES", 3 * 67 * 4)
    told_in_parts, parts, _ = both(c, build(name), teacher=teacher, chunk_size=8)
    where = "evaluate and _tile_of in loss/chunked.py, take in loss/teacher.py"
    close(parts, whole, name, "chunked.py")
    for field in ("token_loss", "trust", "target_p_y", "moved"):
        compare.close(getattr(told_in_parts, field), getattr(told, field), f"{field} of {name!r}", where)


def test_a_token_of_no_weight_moves_nothing():
    c, nothing = case(), {"token_weight": torch.zeros(13)}
    out, fused, _ = both(c, build("target_sft"), nothing)
    assert all((x == 0).all() for x in fused)
    for field in ("moved", "grad_mass"):
        assert (getattr(out, field) == 0).all(), f"{field}: see _weigh in loss/chunked.py"


def test_autocast_rounds_the_inputs_and_leaves_double_precision_alone():
    c, exact = case(), case(dtype=torch.float64)
    half = case(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, double = both(c, build("dft"))[1], both(exact, build("dft"))[1]
    assert rounded[1].dtype == torch.float32
    where = "the choice of `compute` in loss/fused.py"
    compare.close(rounded[0], both(half, build("dft"))[1][0], "loss under autocast", where)
    compare.close(double, both(exact, build("dft"))[1], "loss of float64 under autocast", where)


@pytest.mark.parametrize("softcap", [3.0, 30.0])
def test_a_capped_teacher_has_nothing_where_it_has_no_column(softcap):
    c = case(V_T=50)
    teacher = ProjectedLogits(c["teacher"].hidden, c["teacher"].weight, softcap=softcap)
    _, fused, _ = both(c, build("target_sft"), teacher=teacher)
    z = dense(c["hidden"], c["weight"])
    taught = torch.full_like(z, -torch.inf)
    taught[:, :50] = dense(teacher.hidden, teacher.weight, softcap=softcap)
    loss = reference_loss(z, c["labels"], build("target_sft"), taught)
    close(fused, (loss, *torch.autograd.grad(loss, (c["hidden"], c["weight"]))))


def test_large_weights_do_not_overflow_float16():
    c = case(dtype=torch.float16, spread=0.3, masked=False)
    weights = {"token_weight": torch.full((13,), 100.0)}
    _, fused, reference = both(c, build("nll"), weights)
    close(fused, reference, rtol=1e-2, atol=0.5)


def test_a_tile_of_another_kind_is_not_kept():
    c = case()
    KEPT.buffers.clear()
    torch.set_default_device("meta")
    try:
        both(c, build("nll"))
    except RuntimeError:
        pass
    finally:
        torch.set_default_device(None)
    assert {buffer.device.type for buffer in KEPT.buffers.values()} <= {"cpu"}


@pytest.mark.parametrize("eta", [-0.5, 0.0, 0.25, 1.0, 1.5])
def test_impossible_columns_on_either_side(eta):
    c = case(bias=True, V=31)
    c["bias"] = c["bias"].detach().index_fill(0, torch.tensor([3, 30]), -torch.inf).requires_grad_()
    c["labels"] = c["labels"].where(~torch.isin(c["labels"], torch.tensor([3, 30])), 4)
    t = c["teacher"]
    hole = torch.zeros(31).index_fill(0, torch.tensor([4, 7]), -torch.inf)
    c["teacher"] = ProjectedLogits(t.hidden, t.weight, hole)
    out, fused, reference = both(c, build("target_sft", eta=eta))
    assert out.loss.isfinite()
    close(fused[:2], reference[:2], "target_sft")


@pytest.mark.parametrize("wants", [(True, False), (False, True), (False, False)])
def test_a_frozen_side_gets_no_gradient_and_the_other_is_unchanged(wants):
    c = case()
    full = both(c, build("target_sft"))[1]
    hidden, weight = (x.detach().requires_grad_(w) for x, w in zip((c["hidden"], c["weight"]), wants, strict=True))
    out = qtarget_loss(hidden, weight, c["labels"], build("target_sft"), teacher=c["teacher"])
    torch.testing.assert_close(out.loss, full[0])
    if not any(wants):
        assert not out.loss.requires_grad
        return
    out.loss.backward()
    for x, wanted, expected in zip((hidden, weight), wants, full[1:], strict=True):
        assert (x.grad is not None) == wanted
        if wanted:
            torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_nothing_to_learn_is_a_differentiable_zero(n):
    c = case(n=n, masked=False)
    c["labels"][:] = -100
    for name in PRESETS:
        out = qtarget_loss(c["hidden"], c["weight"], c["labels"], build(name), teacher=c["teacher"], **extras(name, c))
        gradients = torch.autograd.grad(out.loss, (c["hidden"], c["weight"]))
        assert out.loss == 0
        assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("chunk_size", [1, 3, 128])
def test_results_do_not_depend_on_the_chunk_size_or_the_order(chunk_size):
    c = case(n=29)
    whole, again = both(c, build("asft")), both(c, build("asft"), chunk_size=chunk_size)
    close(again[1], whole[1], "asft", "chunked.py")
    order = torch.randperm(29, generator=torch.Generator().manual_seed(1))
    shuffled = qtarget_loss(
        c["hidden"][order], c["weight"], c["labels"][order], build("asft"), teacher=c["teacher"].take(order)
    )
    torch.testing.assert_close(shuffled.token_loss, whole[0].token_loss[order])


def test_one_row_one_column_last_label_and_huge_logits():
    for n, V in [(1, 1), (1, 2), (3, 31)]:
        c = case(n=n, V=V, masked=False, spread=1e3)
        c["labels"][:] = V - 1
        for name in ("nll", "dft", "target_sft", "label_smoothing", "eaft", "idft"):
            out, fused, reference = both(c, build(name))
            assert out.loss.isfinite()
            close(fused, reference, name, rtol=1e-4, atol=1e-3)


def test_a_label_that_is_almost_certain_keeps_its_digits():
    """At logits of 1000, `z_y - logsumexp(z)` in float32 is a multiple of 6e-5."""
    hidden, weight = torch.tensor([[1000.0, 991.0]], requires_grad=True), torch.eye(2, requires_grad=True)
    out = qtarget_loss(hidden, weight, torch.tensor([0]), build("nll"))
    assert math.isclose(out.log_p_y.item(), -math.log1p(math.exp(-9)), rel_tol=1e-3)


def test_a_second_backward_over_a_kept_graph_gives_the_same():
    c = case()
    out, leaves = qtarget_loss(c["hidden"], c["weight"], c["labels"], build("dft")), (c["hidden"], c["weight"])
    first = torch.autograd.grad(2 * out.loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    last = torch.autograd.grad(6 * out.loss, leaves)
    for a, b, c in zip(first, kept, last, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, 3 * b)


def test_inputs_need_not_be_contiguous_and_may_have_more_axes():
    c = case(n=12, masked=True)
    flat = qtarget_loss(c["hidden"], c["weight"], c["labels"], build("dft"))
    hidden = c["hidden"].detach().T.contiguous().T.view(3, 4, 8)
    out = qtarget_loss(hidden, c["weight"].detach().T.contiguous().T, c["labels"].view(3, 4), build("dft"))
    assert out.token_loss.shape == (3, 4)
    torch.testing.assert_close(out.token_loss.flatten(), flat.token_loss)


def test_rank_mass_counts_the_label_once_and_nothing_of_its_rank():
    logits, labels = torch.tensor([[0.0, 0.0, 1.0, 2.0]]), torch.tensor([1])
    q = logits.double().softmax(-1)
    torch.testing.assert_close(torch_tiles.rank_mass(logits.double(), labels), q[:, 1])
    torch.testing.assert_close(torch_tiles.rank_mass(logits.double(), torch.tensor([3])), torch.ones(1).double())


def test_entropy_of_a_certain_row_is_not_negative():
    out = qtarget_loss(torch.eye(1) * 30, torch.randn(64, 1), torch.tensor([0]), build("nll"))
    assert (out.entropy >= 0).all()


def test_psft_clamps_the_ratio_and_gives_no_gradient_beyond_the_clamp():
    z = torch.tensor([[0.0, 60.0], [0.0, 60.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-30.0, -90.0], dtype=torch.float64)  # log ratios -30 and +30
    loss = reference_loss(z, torch.tensor([0, 0]), build("psft", eps_high=1e12), reference_log_p_y=old)
    torch.testing.assert_close(loss, -torch.tensor([-20.0, 20.0], dtype=torch.float64).exp().sum())
    assert (torch.autograd.grad(loss, z)[0] == 0).all()


# Where a number lies in a batch


def test_labels_and_columns_lie_where_their_tokens_are_predicted():
    where = "see shifted and shifted_labels in loss/per_token.py"
    batch = {"labels": torch.tensor([[-100, 6, 7], [8, 9, -100]])}
    assert shifted_labels(batch).tolist() == [[6, 7, -100], [9, -100, -100]], where
    assert shifted(torch.tensor([[0.1, 0.5, 0.25]])).tolist() == [[0.5, 0.25, 0]], where
    split = torch.tensor([[7, 8, 9]])  # part of a longer row, whose labels are shifted already
    assert shifted_labels({**batch, "shift_labels": split}) is split, where


def test_virtual_tokens_stand_before_those_of_the_data():
    tokens = PerToken(torch.tensor([[-100, 5, 6]]), trust=torch.tensor([[0.5, 0.25, 1]])).last(2)
    assert tokens.labels.tolist() == [[5, 6]], "see last in loss/per_token.py"
    assert tokens.trust.tolist() == [[0.25, 1]], "see last in loss/per_token.py"


# Sparse teachers

SPARSE = "sparse.py, SparseRows in loss/torch_tiles.py"


def top_k(c, k):
    t = c["teacher"]
    top = dense(t.hidden, t.weight).log_softmax(-1).topk(k)
    return TopKLogits(top.indices, top.values)


def sparse_as_dense(c, sparse, z):
    """The documented tail written out: student-shaped, with the teacher's tail mass."""
    p = z.detach().softmax(-1)
    known = torch.zeros_like(p, dtype=torch.bool).scatter(-1, sparse.ids, True)
    tail = p.masked_fill(known, 0)
    mass = 1 - sparse.log_probs.exp().sum(-1, keepdim=True)
    q = tail * mass / tail.sum(-1, keepdim=True)
    return q.scatter(-1, sparse.ids, sparse.log_probs.exp()).log()


@pytest.mark.parametrize("name", TAUGHT)
@pytest.mark.parametrize("k", [1, 20])
def test_a_sparse_teacher_equals_its_tail_written_out(name, k):
    c = case(dtype=torch.float64)
    c["labels"][0] = top_k(c, k).ids[0, 0]
    sparse = top_k(c, k)
    z = dense(c["hidden"], c["weight"])
    loss = reference_loss(z, c["labels"], build(name), sparse_as_dense(c, sparse, z))
    fused = both(c, build(name), teacher=sparse)[1]
    expected = loss, *torch.autograd.grad(loss, (c["hidden"], c["weight"]))
    close(fused, expected, name, SPARSE, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", TAUGHT)
def test_a_sparse_teacher_with_every_id_is_the_dense_one(name):
    c = case()
    close(both(c, build(name), teacher=top_k(c, 67))[1], both(c, build(name))[1], name, SPARSE)


@pytest.mark.parametrize("k", [1, 5, 67])
def test_a_sparse_teacher_that_is_the_student_is_exact_at_any_k(k):
    c = case(masked=False)
    top = dense(c["hidden"], c["weight"]).detach().log_softmax(-1).topk(k)
    sparse = TopKLogits(top.indices, top.values)
    dft = both(c, build("dft"))[1]
    ours = both(c, build("target_sft", eta=0.7), teacher=sparse)[1]
    close(ours[1:], dft[1:], "target_sft", SPARSE, parts=tuple(STAGES)[1:])


def test_a_sure_student_and_a_doubting_teacher_keep_the_tail():
    """The student's tail mass is 1e-9: as a difference from one it would be lost in float32."""
    z = torch.cat([torch.zeros(2, 1), torch.full((2, 30), -24.0) + torch.randn(2, 30)], dim=-1)
    hidden, weight = torch.eye(2), z.T.contiguous().requires_grad_()
    sparse = TopKLogits(torch.zeros(2, 1, dtype=torch.long), torch.full((2, 1), math.log(0.9)))
    out = qtarget_loss(hidden, weight, torch.tensor([0, 0]), build("kd"), teacher=sparse)
    (gradient,) = torch.autograd.grad(out.loss, weight)
    torch.testing.assert_close(gradient[1:].sum(), torch.tensor(-0.2), rtol=1e-4, atol=0)


def test_a_sparse_teacher_needs_exponents_that_sum_to_one():
    c = case()
    target = Target(trust=0.5, residual=Residual(student=1.0, teacher=1.0))
    with pytest.raises(ValueError, match="exponents sum to one"):
        qtarget_loss(c["hidden"], c["weight"], c["labels"], target, teacher=top_k(c, 3))


# Properties


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16), spread=st.floats(0.01, 30), name=st.sampled_from(["dft", "kd", "target_sft", "gem"])
)
def test_gradient_rows_sum_to_zero(seed, spread, name):
    """The head's bias gradient is the sum of the rows' gradients."""
    c = case(seed=seed, spread=spread, bias=True)
    fused = both(c, build(name))[1]
    assert fused[3].sum().abs() < 1e-4


def test_gradcheck_with_a_fixed_target():
    c = case(n=4, V=7, D=3, dtype=torch.float64, masked=False, bias=True)

    def loss(hidden, weight, bias):
        return qtarget_loss(hidden, weight, c["labels"], build("kd_hybrid"), teacher=c["teacher"], bias=bias).loss

    assert torch.autograd.gradcheck(loss, (c["hidden"], c["weight"], c["bias"]))


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_told_of_a_target_follows_from_its_gradient(name):
    """dloss/dz = s * (p - Q) gives Q(y) = p(y) - dloss/dz(y) / s, and the two L1 norms."""
    c = case(dtype=torch.float64, masked=False)
    token_weight = torch.linspace(-1, 2, 14, dtype=torch.float64)[:13]  # none is zero
    more = {**extras(name, c), "token_weight": token_weight}
    out, _, _ = both(c, build(name), more)
    z = dense(c["hidden"], c["weight"]).detach().requires_grad_()
    t = c["teacher"]
    loss = reference_loss(z, c["labels"], build(name), dense(t.hidden, t.weight), **more)
    (gradient,) = torch.autograd.grad(loss, z)
    p_y, at_label = (torch_tiles.pick(x, c["labels"]) for x in (z.detach().softmax(-1), gradient))
    s = {"sft_kl": 1.1, "asft": p_y + 0.05}.get(name, 1.0)
    s = s if name == "critical_token" else s * token_weight
    mass = gradient.abs().sum(-1) / 2
    for field, expected in {"grad_mass": mass, "moved": mass / abs(s), "target_p_y": p_y - at_label / s}.items():
        where = "target_p_y in theory/target.py, _weigh in loss/chunked.py, the norm of write_gradient"
        compare.close(getattr(out, field), expected, f"{field} of {name!r}", where)


STATISTICS = [name for name, member in vars(DenseStatistics).items() if isinstance(member, cached_property)]


@pytest.mark.parametrize("residual", [STUDENT, UNIFORM, TEACHER, Residual(0.7, 0.3)], ids=str)
@pytest.mark.parametrize("k", [None, 5], ids=["dense", "top-K"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_every_statistic_that_a_rule_may_read_is_the_specified_one(backend, k, residual):
    if k and residual == UNIFORM:
        return  # its exponents do not sum to one
    c, tiles = case(masked=False), tiles_of(backend)
    z, t = dense(c["hidden"], c["weight"]).detach(), dense(c["teacher"].hidden, c["teacher"].weight)
    teacher = top_k(c, k) if k else DenseTile(t.float())
    log_q = sparse_as_dense(c, teacher, z) if k else t.log_softmax(-1)
    specified = DenseStatistics(z.log_softmax(-1), c["labels"], residual, log_q)
    rows = tiles.rows(z.float(), c["labels"], residual, teacher)
    unknown = {"log_pool"} | ({"teacher_mass"} if k else set())
    unknown |= {"teacher_log_p_y"} if k and residual.is_student else set()
    for name in (name for name in STATISTICS if name not in unknown):
        what, where = f"{name} beside {residual}", f"{name} in loss/{backend}_tiles.py or loss/sparse.py"
        compare.close(getattr(rows, name).double(), getattr(specified, name), what, where, rtol=1e-4, atol=1e-5)
    what, where = "top_evenness", f"top_evenness in loss/{backend}_tiles.py"
    compare.close(rows.top_evenness(9).double(), specified.top_evenness(9), what, where, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("teacher", [None, 5], ids=["dense", "top-K"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_is_told_of_a_student_is_that_of_its_logits(teacher, backend):
    tiles_of(backend)
    c = case(masked=False)
    log_p = dense(c["hidden"], c["weight"]).detach().log_softmax(-1)
    c["labels"][:3] = log_p[:3].argmax(-1)
    out, _, _ = both(c, build("target_sft"), teacher=teacher and top_k(c, teacher), backend=backend)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    for field, expected in {"log_p_y": torch_tiles.pick(log_p, c["labels"]), "entropy": entropy}.items():
        compare.close(getattr(out, field), expected.float(), field, f"the statistics in loss/{backend}_tiles.py")
    assert torch.equal(out.is_top1, log_p.argmax(-1) == c["labels"]), f"is_top1: see loss/{backend}_tiles.py"


def test_what_is_told_of_tokens_carries_no_gradient():
    out, _, _ = both(case(), build("target_sft"))
    with_gradient = [name for name, x in vars(out).items() if x.requires_grad]
    assert with_gradient == ["loss"], "see mark_non_differentiable in loss/chunked.py"


def test_rules_compute_in_double_precision():
    """A probability of e^-120 is zero in single precision, and so are all its powers."""
    hidden, weight = torch.tensor([[120.0, 0.0]]), torch.eye(2)
    out = qtarget_loss(hidden, weight, torch.tensor([1]), Target(trust=lambda t: t.p_y**0.1))
    assert out.trust.item() == pytest.approx(math.exp(-12), rel=1e-3), "see precise in loss/products.py"


def test_token_weight_multiplies_loss_and_gradient():
    c = case(masked=False)
    ones = both(c, build("target_sft"))[1]
    twos = both(c, build("target_sft"), {"token_weight": torch.full((13,), 2.0)})[1]
    close(twos, [2 * x for x in ones], "target_sft", "chunked.py")


class Largest(TorchDispatchMode):
    """Records the most elements that any operation returned in a new tensor."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("name", ["nll", "target_sft", "label_smoothing", "iw_sft"])
def test_no_logits_of_the_whole_batch_are_ever_allocated(name):
    n, V, D, chunk = 96, 1024, 8, 16
    c = case(n=n, V=V, D=D, masked=False)
    KEPT.buffers.clear()  # another test may have left a larger one
    with Largest() as largest:
        both_out = qtarget_loss(
            c["hidden"], c["weight"], c["labels"], build(name),
            teacher=c["teacher"], chunk_size=chunk, **extras(name, c),
        )  # fmt: skip
        both_out.loss.backward()
    assert largest.elements <= max(chunk * V, V * D)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"target": build("target_sft")}, "needs teacher logits, and no teacher"),
        ({"target": build("asft")}, "needs reference logits"),
        ({"target": build("iw_sft")}, "under another model"),
        ({"target": build("iw_sft"), "teacher": case()["teacher"]}, "under another model"),
        ({"target": build("prift"), "teacher": top_k(case(), 3)}, "A top-K teacher does not give every label's"),
        ({"target": build("critical_token")}, "token_weight"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "labels has 3 rows, hidden has 13"),
        ({"weight": torch.zeros(67, 9)}, "hidden is 8 wide, weight is 9"),
        ({"backend": "cuda"}, "Unknown backend 'cuda'"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"softcap": 0.0}, "softcap must be positive"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(kwargs, message):
    c = case()
    arguments = {"hidden": c["hidden"], "weight": c["weight"], "labels": c["labels"], "target": build("nll"), **kwargs}
    with pytest.raises(ValueError, match=message):
        qtarget_loss(**arguments)
