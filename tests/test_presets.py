"""Every preset against its paper's own loss, the identities between them, and what users may type."""

import importlib
import math
import sys
from dataclasses import dataclass, replace
from functools import partial

import compare
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from published import PUBLISHED, Extra, log_p_of
from torch import Tensor

from trl_qtarget import PRESETS, Residual, Target, build, induced_target, preset, reference_loss
from trl_qtarget.theory.presets import find_preset
from trl_qtarget.theory.reference import dense_tokens
from trl_qtarget.theory.registry import Share


# Beside the defaults, which are always tested. `eta=0` is not here: there we report dft's value, see the identities.
ARGUMENTS = {
    "beyond_log": [{"alpha": 0.0}, {"alpha": 1e-6}, {"alpha": 10.0}, {"alpha": -0.25}],
    "profit": [{"tau": 1e-3}, {"tau": 0.5}, {"tau": 1.0}],
    "eaft": [{"alpha": 0.0}, {"alpha": 0.333}, {"k": 5}],
    "iw_sft": [{"temperature": 2.0, "clip": 1.5}, {"temperature": 0.0}],
    "label_smoothing": [{"lam": 0.7}, {"lam": 1.0}],
    "sft_kl": [{"lam": 3.0}],
    "asft": [{"lam": 0.0}, {"lam": 2.0}],
    "psft": [{"eps_high": 0.0}, {"eps_high": 9.0}],
    "gem": [{"beta": 0.3}, {"beta": 1.0}, {"beta": 4.0}],
    "kd_hybrid": [{"lam": 0.2}],
    "target_sft": [{"eta": 0.1}, {"eta": 1.0}, {"eta": 1.5}],
    "prift": [{"statistic": "mass"}, {"statistic": "mass", "threshold": 0.9}],
    "talr": [{"floor": 0.0}, {"floor": 0.3}],
    "idft": [{"b": 0.2}, {"low": 0.5, "high": 1.0}],
}
NOT_IN_THE_LOSS = {"refresh"}  # when psft's snapshot is taken: the trainer's business
CASES = [(name, kwargs) for name in PRESETS for kwargs in ({}, *ARGUMENTS.get(name, ()))]
IDS = [name + "".join(f"-{k}={v}" for k, v in kwargs.items()) for name, kwargs in CASES]


@dataclass(frozen=True)
class Problem:
    logits: Tensor  # (N, V)
    labels: Tensor  # (N,)
    extra: Extra


@st.composite
def problems(draw, hard=True, least_vocab=2) -> Problem:
    """Rows from flat to one-hot; where `hard`, with labels of probability 0 and 1 and tokens the teacher excludes."""
    n, vocab = draw(st.integers(1, 8)), draw(st.integers(least_vocab, 40))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    coldest = -2 if hard else -0.5
    logits = normal(n, vocab) / 10 ** draw(st.floats(coldest, 2))
    teacher_logits = normal(n, vocab) / 10 ** draw(st.floats(coldest, 2))
    labels = torch.randint(vocab, (n,), generator=random)
    if hard:
        certain = torch.rand(n, generator=random) < draw(st.sampled_from([0, 0.5, 1]))
        labels = torch.where(certain, logits.argmax(-1), labels)
        impossible = torch.rand(n, generator=random) < draw(st.sampled_from([0, 0.3, 1]))
        logits[impossible, labels[impossible]] -= 800  # exp(-800) is 0 in float64
        excluded = torch.rand(n, vocab, generator=random) < draw(st.sampled_from([0, 0.3, 0.9]))
        excluded[torch.arange(n), torch.randint(vocab, (n,), generator=random)] = False
        teacher_logits = teacher_logits.masked_fill(excluded, -torch.inf)
    moved = normal(n) * 10 ** draw(st.floats(-2, 1.5))  # log pi - log pi_ref: within psft's clip, and far outside
    extra = Extra(
        teacher_logits=teacher_logits,
        reference_log_p_y=(log_p_of(logits, labels) - moved).clamp(max=0),
        token_weight=torch.randint(2, (n,), generator=random).double(),
        trajectory=torch.randint(n, (n,), generator=random),
    )
    return Problem(logits, labels, extra)


def ours(problem: Problem, target: Target, token_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(), (N, V): our loss of the problem and its gradient."""
    extra, z = problem.extra, problem.logits.clone().requires_grad_()
    loss = reference_loss(
        z,
        problem.labels,
        target,
        extra.teacher_logits,
        reference_log_p_y=extra.reference_log_p_y,
        token_weight=extra.token_weight if "token_weight" in target.needs else token_weight,
        trajectory=extra.trajectory,
    )
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def published(problem: Problem, loss, token_weight: Tensor | float = 1.0, **kwargs) -> tuple[Tensor, Tensor]:
    """(), (N, V): the published loss of the problem and its gradient."""
    z = problem.logits.clone().requires_grad_()
    value = (token_weight * loss(z, problem.labels, problem.extra, **kwargs)).sum()
    return value.detach(), torch.autograd.grad(value, z)[0]


# A loss and its gradient, and where to look if the first that differs is this one
STAGES = {
    "loss": "theory/presets.py, weights and token_loss in theory/target.py",
    "gradient": "theory/presets.py, weights in theory/target.py, no_grad and _target_mass in theory/reference.py",
}


def assert_close(actual, expected, name="the target", where=None):
    """Tighter than torch's 1e-7 for float64, which lets single precision in a weight pass."""
    stages = STAGES
    if isinstance(actual, Tensor):
        actual, expected, stages = (actual,), (expected,), {"a result": "theory/presets.py, theory/reference.py"}
    for (part, stage), a, b in zip(stages.items(), actual, expected, strict=True):
        compare.close(a, b, f"{part} of {name!r}", where or stage, rtol=1e-10, atol=1e-10)


def with_own_reference(problem: Problem) -> Problem:
    """The problem at the first step: reference, old policy and teacher are the student."""
    log_p_y = log_p_of(problem.logits, problem.labels)
    return replace(problem, extra=replace(problem.extra, teacher_logits=problem.logits, reference_log_p_y=log_p_y))


# What each preset means


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_an_oracle_and_every_argument_a_test(name):
    assert name in PUBLISHED, f"write the paper's own loss of {name!r} into tests/published.py"
    tested = {argument for kwargs in ARGUMENTS.get(name, ()) for argument in kwargs}
    assert tested == set(PRESETS[name].defaults) - NOT_IN_THE_LOSS, f"add arguments of {name!r} to ARGUMENTS"


@pytest.mark.parametrize(("name", "kwargs"), CASES, ids=IDS)
@settings(max_examples=40)
@given(problem=problems())
def test_preset_is_its_papers_loss(name, kwargs, problem):
    assert_close(ours(problem, build(name, **kwargs)), published(problem, PUBLISHED[name], **kwargs), name)


@pytest.mark.parametrize("name", PRESETS)
@given(problem=problems())
def test_gradient_rows_sum_to_zero(name, problem):
    _, gradient = ours(problem, build(name))
    assert (gradient.sum(-1).abs() <= 1e-12 * gradient.abs().sum(-1) + 1e-15).all()


@pytest.mark.parametrize("name", [name for name in PRESETS if "token_weight" not in PRESETS[name].needs])
@given(problem=problems(), weight=st.floats(0, 3))
def test_token_weight_multiplies_the_loss(name, problem, weight):
    token_weight = problem.extra.token_weight * weight + 0.5
    weighted = published(problem, PUBLISHED[name], token_weight)
    assert_close(ours(problem, build(name), token_weight), weighted, name, "_is_weighted in theory/target.py")


@pytest.mark.parametrize("name", PRESETS)
@given(problem=problems(least_vocab=20), excluded=st.integers(1, 5))  # 20: eaft's k counts columns
def test_excluded_vocabulary_is_as_if_absent(name, problem, excluded):
    teacher_logits = F.pad(problem.extra.teacher_logits, (0, excluded), value=-torch.inf)
    padded = Problem(
        F.pad(problem.logits, (0, excluded), value=-torch.inf),
        problem.labels,
        replace(problem.extra, teacher_logits=teacher_logits),
    )
    value, gradient = ours(problem, build(name))
    assert_close(ours(padded, build(name)), (value, F.pad(gradient, (0, excluded))))


@pytest.mark.parametrize("name", PRESETS)
@given(problem=problems(), data=st.data())
def test_ignored_tokens_contribute_nothing(name, problem, data):
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(problem.labels), max_size=len(problem.labels))))
    value, gradient = ours(replace(problem, labels=problem.labels.where(keep, -100)), build(name))
    extra = Extra(*(getattr(problem.extra, field)[keep] for field in Extra.__dataclass_fields__))
    rest = Problem(problem.logits[keep], problem.labels[keep], extra)
    assert_close((value, gradient[keep]), ours(rest, build(name)))
    assert (gradient[~keep] == 0).all()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("n", [0, 3])
def test_batch_without_labels_is_a_differentiable_zero(name, n):
    extra = Extra(torch.zeros(n, 5), torch.zeros(n), torch.ones(n), torch.arange(n))
    value, gradient = ours(Problem(torch.zeros(n, 5), torch.full((n,), -100), extra), build(name))
    assert value == 0
    assert torch.equal(gradient, torch.zeros(n, 5))


@pytest.mark.parametrize("name", ["beyond_log", "psft", "deft", "gem", "sft_kl", "asft"])
@pytest.mark.parametrize("gamma", [0.3, 1.0], ids=["column", "trusted tokens"])
@given(problem=problems(hard=False))
def test_under_another_trust_the_value_is_that_of_the_cross_entropy(name, gamma, problem):
    """What a paper publishes holds for its own gamma alone."""
    z, y, extra = problem.logits, problem.labels, problem.extra
    target, column = build(name), {"trust": z.new_full(y.shape, gamma)}
    if gamma == 1:
        target, column = target.trusting(token_ids=range(z.shape[-1])), {}
    value = reference_loss(z, y, target, extra.teacher_logits, reference_log_p_y=extra.reference_log_p_y, **column)
    log_p_y, log_p = log_p_of(z, y), z.log_softmax(-1)
    reference, sharpened = extra.teacher_logits.softmax(-1), (z / 0.7).softmax(-1)
    residual, share = {"gem": (sharpened, -1), "sft_kl": (reference, 1 - gamma), "asft": (reference, 1 - gamma)}.get(
        name,
        (torch.zeros_like(z), 0),  # the student: its term has no gradient and is left out
    )
    s = {"sft_kl": 1.1, "asft": log_p_y.exp() + 0.05}.get(name, 1)
    expected = (s * (-gamma * log_p_y - share * (residual * log_p).sum(-1))).sum()
    assert_close(value, expected, name, "token_loss and trusting in theory/target.py")


@pytest.mark.parametrize(("student", "teacher"), [(0.3, 0.2), (1.0, 0.5), (1.0, 1.0), (0.0, 2.0), (1.5, -0.5)])
@given(problem=problems(hard=False))
def test_every_residual_of_the_plane_is_the_pool_of_both_models(student, teacher, problem):
    def written_out(logits, labels, extra):
        pool = (student * logits.detach() + teacher * extra.teacher_logits).softmax(-1)
        target = 0.4 * F.one_hot(labels, logits.shape[-1]).to(pool) + 0.6 * pool
        return F.cross_entropy(logits, target, reduction="none")

    target = Target(trust=0.4, residual=Residual(student, teacher))
    where = "pool and _target_mass in theory/reference.py, is_student in theory/target.py"
    assert_close(ours(problem, target), published(problem, written_out), f"{target.residual}", where)


def test_critical_token_reads_a_weight_once():
    logits, labels = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0])
    loss = reference_loss(logits, labels, build("critical_token"), token_weight=torch.tensor([0.5]))
    assert loss == pytest.approx(0.5 * math.log(2)), "_is_weighted in theory/target.py"


def test_profit_keeps_a_token_at_its_threshold():
    logits, labels = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0])
    assert reference_loss(logits, labels, build("profit", tau=0.5)) == pytest.approx(math.log(2))


@given(problem=problems(), eps_low=st.floats(0, 1))
def test_psft_lower_bound_never_acts(problem, eps_low):
    assert_close(ours(problem, build("psft")), published(problem, PUBLISHED["psft"], eps_low=eps_low))


@given(problem=problems())
def test_prift_reads_the_reference_off_its_logits_where_no_column_is_given(problem):
    log_p_y = log_p_of(problem.extra.teacher_logits, problem.labels)
    column = replace(problem, extra=replace(problem.extra, reference_log_p_y=log_p_y))
    logits = replace(problem, extra=replace(problem.extra, reference_log_p_y=None))
    assert_close(ours(logits, build("prift")), ours(column, build("prift")))


# Identities


@given(problem=problems())
def test_target_sft_without_guidance_is_dft(problem):
    assert_close(ours(problem, build("target_sft", eta=0)), ours(problem, build("dft")))


@given(problem=problems(), eta=st.floats(0.1, 1))
def test_target_sft_guided_by_the_student_is_dft(problem, eta):
    """In gradient. The value keeps the cross-entropy (1 - p) H(p) of the student with itself."""
    problem = with_own_reference(problem)
    value, gradient = ours(problem, build("dft"))
    entropy = torch.special.entr(problem.logits.softmax(-1)).sum(-1)
    share = -torch.expm1(log_p_of(problem.logits, problem.labels))
    assert_close(ours(problem, build("target_sft", eta=eta)), (value + (share * entropy).sum(), gradient))


@given(problem=problems())
def test_target_sft_of_full_guidance_is_kd_hybrid_gated_by_p(problem):
    def gated(logits, labels, extra):
        p = log_p_of(logits, labels).exp().detach()
        return p * PUBLISHED["nll"](logits, labels, extra) + (1 - p) * PUBLISHED["kd"](logits, labels, extra)

    assert_close(ours(problem, build("target_sft", eta=1)), published(problem, gated))


@given(problem=problems())
def test_beyond_log_tends_to_nll(problem):
    nll = ours(problem, build("nll"))
    assert_close(ours(problem, build("beyond_log", alpha=0)), nll)
    assert_close(ours(problem, build("beyond_log", alpha=1e-14)), nll)


@given(problem=problems())
def test_beyond_log_of_exponent_one_has_dfts_gradient(problem):
    value, gradient = ours(problem, build("beyond_log", alpha=1))
    assert_close(gradient, ours(problem, build("dft"))[1])
    assert_close(value, -torch.expm1(log_p_of(problem.logits, problem.labels)).sum())


@given(problem=problems())
def test_asft_without_anchor_is_dft(problem):
    assert_close(ours(problem, build("asft", lam=0)), ours(problem, build("dft")))


@given(problem=problems())
def test_sft_kl_without_penalty_is_nll(problem):
    assert_close(ours(problem, build("sft_kl", lam=0)), ours(problem, build("nll")))


@given(problem=problems(hard=False), lam=st.floats(0.01, 3))
def test_sft_kl_starts_as_nll_with_a_softened_target(problem, lam):
    """Same gradient, and in its own scale Q = (delta + lam * pi) / (1 + lam)."""
    problem = with_own_reference(problem)
    value, gradient = ours(problem, build("sft_kl", lam=lam))
    assert_close((value, gradient), ours(problem, build("nll")))
    p, delta = problem.logits.softmax(-1), F.one_hot(problem.labels, problem.logits.shape[-1])
    assert_close(p - gradient / (1 + lam), (delta + lam * p) / (1 + lam))


@given(problem=problems())
def test_iw_sft_starts_as_nll(problem):
    problem = with_own_reference(problem)
    assert_close(ours(problem, build("iw_sft")), ours(problem, build("nll")))


@given(problem=problems())
def test_psft_starts_with_nlls_gradient(problem):
    problem = with_own_reference(problem)
    value, gradient = ours(problem, build("psft"))
    assert_close(gradient, ours(problem, build("nll"))[1])
    assert_close(value, torch.full_like(value, -len(problem.labels)))


@given(problem=problems())
def test_prift_starts_as_dft(problem):
    problem = with_own_reference(problem)
    assert_close(ours(problem, build("prift")), ours(problem, build("dft")))


@given(problem=problems())
def test_gem_at_temperature_one_has_nlls_gradient(problem):
    assert_close(ours(problem, build("gem", beta=1))[1], ours(problem, build("nll"))[1])


@given(problem=problems())
def test_kd_hybrid_lies_between_nll_and_kd(problem):
    assert_close(ours(problem, build("kd_hybrid", lam=0)), ours(problem, build("nll")))
    assert_close(ours(problem, build("kd_hybrid", lam=1)), ours(problem, build("kd")))


@given(problem=problems())
def test_label_smoothing_of_zero_is_nll(problem):
    assert_close(ours(problem, build("label_smoothing", lam=0)), ours(problem, build("nll")))


# The target that any loss implies


def focal(logits: Tensor, labels: Tensor) -> Tensor:  # its gradient flows through (1 - p)^2
    log_p = log_p_of(logits, labels)
    return -((1 - log_p.exp()) ** 2) * log_p


def focal_trust(p_y: Tensor) -> Tensor:
    return (1 - p_y) ** 2 - 2 * p_y * (1 - p_y) * p_y.log()


def mixed(problem: Problem, trust: Tensor) -> Tensor:  # (N,) -> (N, V)
    """trust * delta_y + (1 - trust) * p."""
    p, delta = problem.logits.softmax(-1), F.one_hot(problem.labels, problem.logits.shape[-1])
    return trust[:, None] * delta + (1 - trust[:, None]) * p


@given(problem=problems())
def test_induced_target_of_nll_is_the_label(problem):
    induced = induced_target(lambda z, y: F.cross_entropy(z, y, reduction="sum"), problem.logits, problem.labels)
    assert_close(induced.target, F.one_hot(problem.labels, problem.logits.shape[-1]).double())
    assert not induced.signed.any()


@given(problem=problems(hard=False))
def test_induced_target_of_dft_trusts_the_label_by_p(problem):
    induced = induced_target(lambda z, y: PUBLISHED["dft"](z, y, problem.extra), problem.logits, problem.labels)
    p_y = log_p_of(problem.logits, problem.labels).exp()
    assert_close(induced.target, mixed(problem, p_y))
    assert_close(induced.scale, p_y)
    assert not induced.signed.any()


@given(problem=problems(hard=False))
def test_induced_target_of_focal_loss_is_signed_where_it_trusts_by_more_than_one(problem):
    induced = induced_target(focal, problem.logits, problem.labels)
    trust = focal_trust(log_p_of(problem.logits, problem.labels).exp())
    assert_close(induced.target, mixed(problem, trust))
    assert_close(induced.scale, trust)
    assert torch.equal(induced.signed, trust > 1)


@given(problem=problems(hard=False), beta=st.floats(0.3, 0.9))
def test_induced_target_of_gem_is_signed(problem, beta):
    z, y = problem.logits, problem.labels
    induced = induced_target(lambda z, y: PUBLISHED["gem"](z, y, problem.extra, beta=beta), z, y)
    p, q, delta = z.softmax(-1), (z / beta).softmax(-1), F.one_hot(y, z.shape[-1])
    assert_close(induced.target, delta + p - q)
    assert torch.equal(induced.signed, (delta + p - q < -1e-9).any(-1))


@pytest.mark.parametrize("name", PRESETS)
@given(problem=problems(hard=False))
def test_induced_scale_is_the_smallest_that_leaves_no_negative_probability(name, problem):
    induced = induced_target(lambda z, y: PUBLISHED[name](z, y, problem.extra), problem.logits, problem.labels)
    p = problem.logits.softmax(-1)
    gradient, scale = p - induced.target, induced.scale[:, None]
    pulled = (gradient.abs() > 1e-6).any(-1)  # below, p - target above has lost the gradient to rounding
    assert ((p - gradient / scale)[pulled] > -1e-8).all()
    assert ((p - gradient / (0.9 * scale))[pulled] < 0).any(-1).all()
    assert_close(induced.target.sum(-1), torch.ones_like(induced.scale))


def test_induced_target_of_a_loss_without_gradient_is_the_student():
    logits = torch.randn(3, 5, dtype=torch.float64)
    induced = induced_target(lambda z, y: 0 * z.log_softmax(-1).sum(), logits, torch.zeros(3).long())
    assert_close(induced.target, logits.softmax(-1))
    assert not induced.scale.any()


def test_induced_target_refuses_a_loss_that_depends_on_the_logits_level():
    with pytest.raises(ValueError, match="constant is added to all logits"):
        induced_target(lambda z, y: z.logsumexp(-1).square(), torch.randn(3, 5), torch.zeros(3).long())


# What users type


@pytest.mark.parametrize(
    ("loss", "kwargs", "message"),
    [
        ("dtf", {}, r"^Unknown loss 'dtf'\. Did you mean 'dft'\? Known losses: asft, beyond_log, critical_token, "),
        ("xyz", {}, r"^Unknown loss 'xyz'\. Known losses: asft, "),
        ("asft", {"beta": 1}, r"^Loss 'asft' takes lam, not beta\.$"),
        ("idft", {"lo": 1, "hi": 2}, r"^Loss 'idft' takes b, low, high, not lo, hi\.$"),
        ("nll", {"lam": 1}, r"^Loss 'nll' takes no arguments, not lam\.$"),
        ("asft", {"lam": -0.1}, r"^Loss 'asft' needs 0 <= lam < inf, got -0\.1\.$"),
        ("sft_kl", {"lam": math.inf}, r"needs 0 <= lam < inf, got inf"),
        ("profit", {"tau": 0}, r"needs 0 < tau <= 1, got 0"),
        ("label_smoothing", {"lam": 1.1}, r"needs 0 <= lam <= 1, got 1\.1"),
        ("gem", {"beta": 0.0}, r"needs 0 < beta < inf, got 0\.0"),
        ("gem", {"beta": True}, r"needs 0 < beta < inf, got True"),
        ("gem", {"beta": None}, r"needs 0 < beta < inf, got None"),
        ("target_sft", {"eta": math.nan}, r"needs a finite eta, got nan"),
        ("eaft", {"k": 0}, r"needs a whole k >= 2, got 0"),
        ("eaft", {"k": 2.5}, r"needs a whole k >= 2, got 2\.5"),
        ("eaft", {"k": math.inf}, r"needs a whole k >= 2, got inf"),
        ("eaft", {"k": "many"}, r"needs a whole k >= 2, got 'many'"),
        ("prift", {"statistic": "rank"}, r"^Loss 'prift' needs statistic to be 'prob' or 'mass', got 'rank'\.$"),
        ("no_such_module:loss", {}, r"^Unknown loss 'no_such_module:loss': there is no module 'no_such_module'"),
        ("no_such_file.py:loss", {}, r"there is no file no_such_file\.py"),
    ],
)
def test_message_says_what_was_given_and_what_is_accepted(loss, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(loss, **kwargs)


@given(problem=problems())
@pytest.mark.parametrize("number", ["5e-2", "0.05"])
def test_a_number_that_yaml_reads_as_text_is_accepted(number, problem):
    assert_close(ours(problem, build("asft", lam=number)), ours(problem, build("asft", lam=0.05)))


OWN_LOSSES = '''
from trl_qtarget import Target, preset

@preset("half_trust", paper="-")
def half_trust(gamma: float = 0.5) -> Target:
    """Believe half of every label."""
    return Target(trust=gamma)

def undecorated(gamma: float = 0.25) -> Target:
    return Target(trust=gamma)

def no_target():
    open("called", "w").close()
'''


@pytest.fixture
def own_losses(tmp_path, monkeypatch):
    """A user's module in the working directory; what importing it changes is undone."""
    (tmp_path / "losses_of_a_user.py").write_text(OWN_LOSSES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    importlib.invalidate_caches()
    known, modules = dict(PRESETS), set(sys.modules)
    yield tmp_path / "losses_of_a_user.py"
    PRESETS.clear()
    PRESETS.update(known)
    for name in set(sys.modules) - modules:
        if "losses_of_a_user" in name:
            del sys.modules[name]


@pytest.mark.usefixtures("own_losses")
def test_decorated_function_is_known_by_its_name():
    @preset("third_trust", paper="-")
    def third_trust(gamma: float = 1 / 3) -> Target:
        """Believe a third of every label.

        gamma = gamma
        """
        return Target(trust=gamma)

    assert build("third_trust", gamma=0.3).trust == 0.3
    assert PRESETS["third_trust"].summary == "Believe a third of every label."
    assert PRESETS["third_trust"].formula == "gamma = gamma"
    with pytest.raises(ValueError, match="Did you mean 'third_trust'"):
        build("third_trsut")


@pytest.mark.usefixtures("own_losses")
def test_name_of_a_known_loss_cannot_be_taken():
    with pytest.raises(ValueError, match="A loss named 'dft' exists already"):

        @preset("dft")
        def other() -> Target:
            return Target()

    assert build("dft").residual == Residual(student=1)


@pytest.mark.usefixtures("own_losses")
@pytest.mark.parametrize("source", ["losses_of_a_user", "losses_of_a_user.py", "./losses_of_a_user.py"])
def test_loss_of_the_users_own_module(source):
    assert build(f"{source}:half_trust").trust == 0.5
    assert build(f"{source}:half_trust", gamma=0.4).trust == 0.4
    assert build(f"{source}:undecorated").trust == 0.25
    with pytest.raises(ValueError, match="takes gamma, not lam"):
        build(f"{source}:undecorated", lam=1)
    with pytest.raises(ValueError, match="no_target has no decorator @preset"):
        build(f"{source}:no_target")
    with pytest.raises(ValueError, match=r"has no loss 'half_trsut'\. Did you mean .*:half_trust\?"):
        build(f"{source}:half_trsut")


def test_file_that_registers_one_loss_needs_no_name(own_losses):
    assert build(str(own_losses)).trust == 0.5
    own_losses.with_name("more_losses_of_a_user.py").write_text(OWN_LOSSES.replace("@preset", "#"))
    with pytest.raises(ValueError, match=r"registers these losses: none\. Say which"):
        build("more_losses_of_a_user.py")


def test_trusting_raises_a_floor_and_believes_some_labels_fully():
    logits, labels = torch.randn(6, 9, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 4])
    rows = dense_tokens(logits.log_softmax(-1), labels, build("dft"))
    gamma = build("dft").trusting(floor=0.2, token_ids=[4]).weights(rows).trust
    expected = rows.p_y.clamp(min=0.2)
    expected[-2:] = 1
    torch.testing.assert_close(gamma, expected)


TAKEN: dict = {}


def hinted(
    number: float = 1.0,
    count: int = 1,
    on: bool = False,
    word: str = "x",
    maybe: float | None = None,
    share: Share | None = None,
    several: list[int] | None = None,
    bare=None,
) -> Target:
    TAKEN.update(locals())
    return Target()


@pytest.mark.parametrize(
    ("name", "value", "taken"),
    [
        ("number", "1e-3", 1e-3),
        ("number", 2, 2.0),
        ("count", "7", 7),
        ("count", 7.0, 7),
        ("on", True, True),
        ("on", "true", True),
        ("on", "False", False),
        ("word", "1e-3", "1e-3"),
        ("word", 5, "5"),
        ("maybe", "1e-3", 1e-3),
        ("maybe", None, None),
        ("share", "0.5", 0.5),
        ("share", None, None),
        ("several", ["1"], ["1"]),
        ("bare", "1e-3", "1e-3"),
    ],
)
def test_values_are_converted_by_the_plain_hints_of_a_users_loss(name, value, taken):
    build(hinted, **{name: value})
    assert TAKEN[name] == taken
    assert type(TAKEN[name]) is type(taken)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("number", "fast", "needs a number for number, got 'fast'"),
        ("number", True, "needs a number for number, got True"),
        ("number", None, "needs a number for number, got None"),
        ("number", [1], r"needs a number for number, got \[1\]"),
        ("count", "2.5", "needs a whole number for count, got '2.5'"),
        ("count", 2.5, "needs a whole number for count, got 2.5"),
        ("count", True, "needs a whole number for count, got True"),
        ("count", float("inf"), "needs a whole number for count, got inf"),
        ("on", "maybe", "needs true or false for on, got 'maybe'"),
        ("on", 1, "needs true or false for on, got 1"),
        ("word", False, "needs a text for word, got False"),
        ("word", ["a"], r"needs a text for word, got \['a'\]"),
        ("maybe", "x", "needs a number for maybe, got 'x'"),
        ("share", 2, "needs 0 <= share <= 1, got 2"),
        ("speed", 1, "takes number, count, on, word, maybe, share, several, bare, not speed"),
    ],
)
def test_values_that_are_not_of_the_plain_hint_are_refused(name, value, said):
    with pytest.raises(ValueError, match=f"^Loss 'hinted' {said}"):
        build(hinted, **{name: value})


def test_functions_and_targets_are_losses():
    target = Target(trust=0.5)
    assert build(target) is target
    assert build(lambda trust=0.5: Target(trust=trust), trust=0.25).trust == 0.25
    assert build(partial(hinted, number=2), count="3") == Target()
    assert (TAKEN["number"], TAKEN["count"]) == (2, 3)
    assert find_preset(PRESETS["dft"].make) is PRESETS["dft"]
    for loss, kwargs, said in (
        (target, {"eta": 1}, "A Target takes no arguments, got eta"),
        (3, {}, "A loss is a name, a function that returns a Target, or a Target, got 3"),
        (lambda: 3, {}, "must return a Target, it returned int"),
        (lambda: 1 / 0, {}, r"<lambda>' raised ZeroDivisionError: division by zero \(line \d+ of .*test_presets.py\)"),
    ):
        with pytest.raises(ValueError, match=said):
            build(loss, **kwargs)
