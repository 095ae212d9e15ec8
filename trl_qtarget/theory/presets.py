"""The methods: each is a sentence in the vocabulary of `target.py`. Add yours here, or in a module of your own.

A preset is a function that returns a `Target`. Its signature is its arguments (published defaults, checked ranges);
the second paragraph of its docstring is the formula that `trl-qtarget losses` and the README show.

    @preset("half_trust", paper="-")
    def half_trust(gamma: Share = 0.5) -> Target:
        '''Believe half of every label.

        gamma = gamma    pi~ = pi    s = 1
        '''
        return Target(trust=gamma)

`pi` is the student, `pi_T` a teacher, `pi_ref` the model before training, `p` the student's probability of the label.
"""

from __future__ import annotations

from typing import Literal

from .registry import (
    PRESETS,
    AnyReal,
    Count,
    NonNegative,
    Positive,
    PositiveShare,
    Preset,
    Several,
    Share,
    build,
    find_preset,
    name_of,
    preset,
)
from .target import TEACHER, UNIFORM, Residual, Target


__all__ = ["PRESETS", "Preset", "build", "find_preset", "name_of", "preset"]

LOG_RATIO_CLAMP = 20.0  # PPO implementations clamp log(pi / pi_old) here; beyond it the gradient is zero


@preset("nll", paper="-")
def nll() -> Target:
    """Standard supervised fine-tuning: the label is the target.

    gamma = 1    pi~ = none    s = 1
    """
    return Target(trust=1.0)


@preset("dft", paper="2508.05629")
def dft() -> Target:
    """Dynamic fine-tuning, the p-loss: trust a label as far as the model already believes it.

    gamma = p    pi~ = pi    s = 1    (reported: p * nll)
    """
    return Target(trust=lambda t: t.p_y)


@preset("beyond_log", paper="2510.00526")
def beyond_log(alpha: AnyReal = 1.0) -> Target:
    """Beyond log likelihood: one family from SFT (alpha = 0) over 1 - p (alpha = 1) to strong priors (alpha = 10).

    gamma = p^alpha    pi~ = pi    s = 1    (reported: (1 - p^alpha) / alpha; a signed target for alpha < 0)
    """
    if alpha == 0:
        return nll()
    return Target(trust=lambda t: (alpha * t.log_p_y).exp(), value=lambda t: -(alpha * t.log_p_y).expm1() / alpha)


@preset("profit", paper="2601.09195")
def profit(tau: PositiveShare = 0.1) -> Target:
    """ProFiT: train on the tokens that the model finds probable enough, and on no other.

    gamma = 1[p >= tau]    pi~ = pi    s = 1    (dropped tokens stay in the denominator, as in its code)
    """
    return Target(trust=lambda t: t.p_y >= tau)


@preset("eaft", paper="2601.02151")
def eaft(alpha: NonNegative = 1.0, k: Several = 20) -> Target:
    """Entropy-adaptive fine-tuning: trust a label where the model is uncertain, change nothing where it is sure.

    gamma = (H_k / log k)^alpha    pi~ = pi    s = 1    (eq. 2 and 3; H_k: entropy of the renormalised top k)
    """
    return Target(trust=lambda t: t.top_evenness(k) ** alpha)


@preset("iw_sft", paper="2507.12856")
def iw_sft(temperature: AnyReal = 1.0, clip: Positive = 16.0) -> Target:
    """Importance-weighted SFT: weight a whole trajectory by how far the model has moved towards it.

    gamma = min(exp(temperature * mean_t log(pi / pi_ref)), clip)    pi~ = pi    s = 1    (signed for gamma > 1)
    """

    def trust(t):
        return (temperature * t.trajectory_mean(t.log_p_y - t.reference_log_p_y)).exp().clamp(max=clip)

    return Target(trust=trust, needs=("reference_log_p_y",), whole_batch=True)


@preset("critical_token", paper="2510.10974")
def critical_token() -> Target:
    """Critical token fine-tuning: train only where another token would have led to a wrong answer.

    gamma = token_weight    pi~ = pi    s = 1    (a column of the data: 1 on critical tokens, 0 elsewhere)
    """
    return Target(trust=lambda t: t.token_weight, needs=("token_weight",))


@preset("label_smoothing", paper="1512.00567")
def label_smoothing(lam: Share = 0.1) -> Target:
    """Label smoothing: a share of the weight is spread evenly over the vocabulary.

    gamma = 1 - lam    pi~ = uniform    s = 1
    """
    return Target(trust=1 - lam, residual=UNIFORM)


@preset("sft_kl", paper="2606.11189")
def sft_kl(lam: NonNegative = 0.1) -> Target:
    """SFT with a KL penalty to the initial model: nll + lam * KL(pi_ref || pi).

    gamma = 1 / (1 + lam)    pi~ = pi_ref    s = 1 + lam
    """
    return Target(
        trust=1 / (1 + lam),
        residual=TEACHER,
        scale=1 + lam,
        value=lambda t: t.nll + lam * t.residual_kl,
        needs=("reference",),
    )


@preset("asft", paper="2509.23753")
def asft(lam: NonNegative = 0.05) -> Target:
    """Anchored SFT: dft + lam * KL(pi_ref || pi).

    gamma = p / (p + lam)    pi~ = pi_ref    s = p + lam    (eq. 6)
    """
    tiny = 1e-300  # p = lam = 0 leaves gamma undefined and s = 0: any finite gamma will do
    return Target(
        trust=lambda t: t.p_y / (t.p_y + lam).clamp(min=tiny),
        residual=TEACHER,
        scale=lambda t: t.p_y + lam,
        value=lambda t: t.p_y * t.nll + lam * t.residual_kl,
        needs=("reference",),
    )


@preset("psft", paper="2508.17784")
def psft(eps_high: NonNegative = 0.28, refresh: Count = 8) -> Target:
    """Proximal SFT: PPO's clipped ratio with advantage one, against the model of at most `refresh` updates ago.

    gamma = r * 1[r <= 1 + eps_high], r = pi / pi_old    pi~ = pi    s = 1    (reported: -min(r, 1 + eps_high))

    PPO's lower bound never acts where the advantage is positive, so it is no argument here.
    """

    def ratio(t):
        return (t.log_p_y - t.reference_log_p_y).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()

    def trust(t):
        inside = (t.log_p_y - t.reference_log_p_y).abs() <= LOG_RATIO_CLAMP
        return ratio(t) * (inside & (ratio(t) <= 1 + eps_high))

    return Target(
        trust=trust,
        value=lambda t: -ratio(t).clamp(max=1 + eps_high),
        needs=("snapshot",),
        snapshot_every=refresh,
    )


@preset("gem", paper="2408.16673")
def gem(beta: Positive = 0.7) -> Target:
    """GEM with h linear: pull the label up and a sharpened copy of the model down, which keeps its diversity.

    Q = delta_y + pi - q, q proportional to pi^(1 / beta)    s = 1    (a signed target; the value may be negative)
    """
    return Target(
        trust=1.0,
        residual=Residual(student=1 / beta),
        residual_weight=-1.0,
        value=lambda t: t.nll - t.residual_nll,
    )


@preset("kd", paper="1503.02531")
def kd() -> Target:
    """Distillation: the teacher is the target at every labelled token, and the label itself has no weight.

    gamma = 0    pi~ = pi_T    s = 1    (reported: the cross entropy to the teacher, at temperature one)
    """
    return Target(trust=0.0, residual=TEACHER)


@preset("kd_hybrid", paper="1503.02531")
def kd_hybrid(lam: Share = 0.5) -> Target:
    """Distillation beside the label, with fixed weights.

    gamma = 1 - lam    pi~ = pi_T    s = 1
    """
    return Target(trust=1 - lam, residual=TEACHER)


@preset("target_sft", paper="2606.11189")
def target_sft(eta: AnyReal = 0.5) -> Target:
    """Target-SFT: trust a label by its probability; the rest goes to a pool of the student and its teacher.

    gamma = p    pi~ proportional to pi^(1 - eta) * pi_T^eta    s = 1    (eta = 0 is dft)
    """
    return Target(trust=lambda t: t.p_y, residual=Residual(student=1 - eta, teacher=eta), needs=("teacher",))


@preset("prift", paper="2606.09396")
def prift(statistic: Literal["prob", "mass"] = "prob", threshold: Share = 0.5) -> Target:
    """PriFT: trust a label as far as the frozen initial model does.

    gamma = pi_ref(y), or 1[rank mass of y under pi_ref >= threshold]    pi~ = pi    s = 1
    """
    if statistic == "prob":
        return Target(trust=lambda t: t.reference_log_p_y.exp(), needs=("reference_log_p_y",))
    return Target(trust=lambda t: t.reference_mass >= threshold, needs=("reference_mass",))


@preset("talr", paper="2509.20758")
def talr(floor: Share = 0.01) -> Target:
    """Token-adaptive loss reweighting: p is softened by the micro-batch's difficulty, so micro-batch size matters.

    gamma = max(p^(1 / tau), floor)    pi~ = pi    s = 1    (tau: median over a micro-batch of a trajectory's mean nll)
    """

    def trust(t):
        tau = t.trajectory_means(t.nll).nanmedian().clamp(min=1e-6)
        return (t.log_p_y / tau).exp().clamp(min=floor)

    return Target(trust=trust, whole_batch=True)


@preset("deft", paper="2602.11424")
def deft() -> Target:
    """DEFT: `beyond_log` whose exponent is the model's concentration a, computed at each token.

    gamma = p^a * a / (a + 1e-6), a = sum_v pi(v)^2    pi~ = pi    s = 1    (reported: (1 - p^a) / (a + 1e-6))
    """
    return Target(
        trust=lambda t: (t.collision * t.log_p_y).exp() * t.collision / (t.collision + 1e-6),
        value=lambda t: -(t.collision * t.log_p_y).expm1() / (t.collision + 1e-6),
    )


@preset("idft", paper="2602.12222")
def idft(b: Positive = 1.0, low: NonNegative = 0.1, high: Positive = 2.0) -> Target:
    """IDFT: trust a label less than dft where it surprises more than the entropy predicts, else more.

    gamma = p^g, g = clip(exp(-(log p + H) / b), low, high)    pi~ = pi    s = 1
    """
    return Target(trust=lambda t: (t.log_p_y * (-(t.log_p_y + t.entropy) / b).exp().clamp(low, high)).exp())
