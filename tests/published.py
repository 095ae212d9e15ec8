"""Each preset's loss as its own paper or official code writes it: the oracle of what a preset means.

Nothing is shared with the package. Each function returns the published value of every token, (N,), and its autograd
gradient is the published gradient: a `.detach()` stands exactly where the source stops the gradient, and nowhere else.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Extra:
    """What some methods read besides the logits. "Reference" is the frozen base model, for `psft` the old policy."""

    teacher_logits: Tensor  # (N, V), the teacher's, or the reference's where a method compares with one
    reference_log_p_y: Tensor  # (N,)
    token_weight: Tensor  # (N,), a column of the dataset
    trajectory: Tensor  # (N,), int: which sequence the token belongs to


def log_p_of(logits: Tensor, labels: Tensor) -> Tensor:  # (N, V), (N,) -> (N,)
    return F.log_softmax(logits, -1).gather(-1, labels[:, None]).squeeze(-1)


def nll(logits, labels, extra):
    return F.cross_entropy(logits, labels, reduction="none")


# 2508.05629; fsdp_dft_trainer.py: CE(none) * softmax(logits).gather(y).detach()
def dft(logits, labels, extra):
    p = logits.softmax(-1).gather(-1, labels[:, None]).squeeze(-1).detach()
    return p * F.cross_entropy(logits, labels, reduction="none")


# 2510.00526; fsdp_sft_trainer.py, GeneralFamily-a: (1 - p^a) / a, full gradient; a -> 0 is -log p
def beyond_log(logits, labels, extra, alpha=1.0):
    log_p = log_p_of(logits, labels)
    return -torch.expm1(alpha * log_p) / alpha if alpha else -log_p


# 2601.09195; _profit_cross_entropy, "higher": labels with p < tau become -100, so p == tau stays (the paper: p > tau)
def profit(logits, labels, extra, tau=0.1):
    dropped = log_p_of(logits, labels).exp().detach() < tau
    return F.cross_entropy(logits, labels.masked_fill(dropped, -100), reduction="none")


# 2601.02151, eq. 2-3: weight = entropy of the renormalised top-K over ln K (the code writes 3.0 for ln 20 = 2.9957)
def eaft(logits, labels, extra, alpha=1.0, k=20):
    k = min(k, logits.shape[-1])
    log_top = logits.detach().topk(k).values.log_softmax(-1)
    evenness = -(log_top.exp() * log_top).sum(-1) / math.log(k)
    return evenness**alpha * F.cross_entropy(logits, labels, reduction="none")


# 2507.12856; IwSFTLoss: one w = clamp(exp(T * mean_t[log pi - log ref]), 0, 16) a trajectory, under no_grad
def iw_sft(logits, labels, extra, temperature=1.0, clip=16.0):
    log_ratio = log_p_of(logits, labels).detach() - extra.reference_log_p_y
    mean = torch.stack([log_ratio[extra.trajectory == t].mean() for t in extra.trajectory])
    return (temperature * mean).exp().clamp(0, clip) * F.cross_entropy(logits, labels, reduction="none")


# 2510.10974: -c_t log p, c_t in {0, 1} comes with the data
def critical_token(logits, labels, extra):
    return extra.token_weight * F.cross_entropy(logits, labels, reduction="none")


# transformers.LabelSmoother: (1 - e) nll + e mean_v(-log p_v), which is torch's own
def label_smoothing(logits, labels, extra, lam=0.1):
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=lam)


# The baseline of 2509.23753 and 2601.02151, train_v2.py mode sft+kl: forward KL(ref || pi). kl_div with a probability
# target is 0 where the target is 0.
def sft_kl(logits, labels, extra, lam=0.1):
    kl = F.kl_div(logits.log_softmax(-1), extra.teacher_logits.softmax(-1), reduction="none").sum(-1)
    return F.cross_entropy(logits, labels, reduction="none") + lam * kl


# 2509.23753, eq. 6; train_v2.py mode asft: L_DFT + lam KL(base || pi)
def asft(logits, labels, extra, lam=0.05):
    kl = F.kl_div(logits.log_softmax(-1), extra.teacher_logits.softmax(-1), reduction="none").sum(-1)
    return dft(logits, labels, extra) + lam * kl


# 2508.17784; verl's PPO loss with every advantage 1
def psft(logits, labels, extra, eps_low=0.2, eps_high=0.28):
    ratio = (log_p_of(logits, labels) - extra.reference_log_p_y).clamp(-20, 20).exp()
    return torch.maximum(-ratio, -ratio.clamp(1 - eps_low, 1 + eps_high))


# 2408.16673, h = linear: -sum_k q_k (log p_y - log p_k), q = sg[softmax(z / beta)]
def gem(logits, labels, extra, beta=0.7):
    log_p, q = logits.log_softmax(-1), (logits / beta).softmax(-1).detach()
    return -(q * (log_p.gather(-1, labels[:, None]) - log_p)).sum(-1)


# 1503.02531 at temperature 1: the cross-entropy CE(teacher, pi), not KL(teacher || pi), which is smaller by H(teacher)
def kd(logits, labels, extra):
    return F.cross_entropy(logits, extra.teacher_logits.softmax(-1), reduction="none")


# 1503.02531, sec. 2: weighted sum of the two cross-entropies
def kd_hybrid(logits, labels, extra, lam=0.5):
    return (1 - lam) * F.cross_entropy(logits, labels, reduction="none") + lam * kd(logits, labels, extra)


# 2606.11189: CE(sg[Q], pi), Q = p delta + (1 - p) guided, guided ~ pi^(1-eta) teacher^eta. The cross-entropy, not
# KL(Q || pi), which is smaller by H(Q). eta = 0 does not read the teacher (0 * -inf).
def target_sft(logits, labels, extra, eta=0.5):
    z = logits.detach()
    guided = ((1 - eta) * z + (eta * extra.teacher_logits if eta else 0)).softmax(-1)
    p, delta = z.softmax(-1).gather(-1, labels[:, None]), F.one_hot(labels, z.shape[-1])
    return F.cross_entropy(logits, p * delta + (1 - p) * guided, reduction="none")


# 2606.09396: weight ref(y), or 1[u >= threshold] with u the reference's mass on y and on all ids less likely than y
def prift(logits, labels, extra, statistic="prob", threshold=0.5):
    if statistic == "prob":
        weight = extra.reference_log_p_y.exp()
    else:
        ref = extra.teacher_logits.softmax(-1)
        ref_y = ref.gather(-1, labels[:, None])
        weight = ((ref * (ref < ref_y)).sum(-1) + ref_y.squeeze(-1) >= threshold).to(logits.dtype)
    return weight * F.cross_entropy(logits, labels, reduction="none")


# 2509.20758: sg[max(p^(1/tau), floor)] * nll, tau = the batch's median of each sequence's mean nll
def talr(logits, labels, extra, floor=0.01):
    loss = F.cross_entropy(logits, labels, reduction="none")
    tau = torch.stack([loss[extra.trajectory == t].mean() for t in extra.trajectory.unique()]).median().clamp(min=1e-6)
    return (-loss / tau).exp().clamp(min=floor).detach() * loss


# 2602.11424: -(p^a - 1) / (a + 1e-6), a = sg[sum_v p_v^2], full gradient through p
def deft(logits, labels, extra):
    a = logits.softmax(-1).square().sum(-1).detach()
    return -torch.expm1(a * log_p_of(logits, labels)) / (a + 1e-6)


# 2602.12222; fsdp_polylog_trainer.py: sg[p^g] * nll, g = clamp(exp(-(log p + H) / b), .1, 2)
def idft(logits, labels, extra, b=1.0, low=0.1, high=2.0):
    log_p, entropy = log_p_of(logits, labels), torch.special.entr(logits.softmax(-1)).sum(-1)
    g = (-(log_p + entropy) / b).exp().clamp(low, high)
    return (g * log_p).exp().detach() * -log_p


PUBLISHED = {
    loss.__name__: loss
    for loss in (
        nll, dft, beyond_log, profit, eaft, iw_sft, critical_token, label_smoothing, sft_kl, asft, psft, gem,
        kd, kd_hybrid, target_sft, prift, talr, deft, idft,
    )
}  # fmt: skip
