"""The vocabulary: a loss is a target distribution, and a target is a trust, a residual and a scale.

At a labelled token with student p = softmax(z) and label y,

    Q = gamma * delta_y + (1 - gamma) * pi~        loss = s * CE(stopgrad[Q], p)        dloss/dz = s * (p - Q)

(Xie et al., arXiv 2606.11189). `Target` holds gamma (trust), pi~ (residual) and s (scale) as data. Kernels see the
weights `s * gamma` and `s * (1 - gamma)` of each token and the two exponents of the residual, never a method's name.

This module does not import torch, since rules only call methods of tensors: `trl-qtarget losses` prints its table
without waiting for torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    from torch import Tensor


LOGITS = {"teacher", "reference", "reference_mass"}  # inputs for which a loss reads a second model's logits

# The inputs that a target may need, as `trl-qtarget losses` explains them to a user
NEEDS = {
    "teacher": "a teacher: --teacher_model_name_or_path",
    **dict.fromkeys(("reference", "reference_log_p_y", "reference_mass"), "the model before training, kept for it"),
    "snapshot": "the model of some updates ago, kept for it",
    "token_weight": "a `token_weight` column in the data",
}


def _statistic(name: str, meaning: str) -> Any:
    def read(tokens: Tokens) -> Tensor:
        if tokens.rows is None:
            raise AttributeError(
                f"A rule of a whole_batch target asked for {name}. Such a rule runs once for the whole batch, when no "
                "statistics of the vocabulary are kept: it may use log_p_y, reference_log_p_y, token_weight and "
                "trajectory."
            )
        return getattr(tokens.rows, name).to(tokens.log_p_y)

    return property(read, doc=meaning)


@dataclass(frozen=True)
class Tokens:
    """The numbers that a rule may read: one detached number per labelled token, in float64 where the device has it.

    Double precision makes `1 - t.p_y` and `t.p_y ** a` safe to write as the papers do; n numbers cost nothing beside
    the n x V logits they summarise. Logarithms and entropies are in nats.
    """

    log_p_y: Tensor  # (n,) log p(y)
    rows: Any = None  # the vocabulary statistics below, each computed when a rule first reads it
    labels: Any = None  # (n,) y
    token_weight: Any = None  # (n,) the dataset's own weights
    given_reference: Tensor | None = None  # (n,) log pi_ref(y) or log pi_old(y) from the data or a second model
    given_mass: Tensor | None = None  # (n,) rank mass of y under pi_ref from the data
    given_trust: Tensor | None = None  # (n,) the dataset's own gamma, NaN where a token has none
    trajectory: Tensor | None = None  # (n,) id of each token's trajectory, in 0 .. n - 1; None: all tokens are one

    @classmethod
    def of(
        cls,
        log_p_y: Tensor,  # (n,)
        rows: Any,
        labels: Tensor,  # (n,)
        *,
        token_weight: Tensor | None = None,  # (n,)
        trust: Tensor | None = None,  # (n,)
        reference_log_p_y: Tensor | None = None,  # (n,)
        reference_mass: Tensor | None = None,  # (n,)
        trajectory: Tensor | None = None,  # (n,)
    ) -> Tokens:
        """Make `Tokens` from columns under their names in the data; all but ids get the type of `log_p_y`."""

        def cast(column: Tensor | None) -> Tensor | None:
            return None if column is None else column.to(log_p_y)

        return cls(
            log_p_y,
            rows,
            labels,
            token_weight=cast(token_weight),
            given_reference=cast(reference_log_p_y),
            given_mass=cast(reference_mass),
            given_trust=cast(trust),
            trajectory=trajectory,
        )

    entropy = _statistic("entropy", "H(p)")
    collision = _statistic("collision", "sum_v p(v)^2")
    residual_log_p_y = _statistic("residual_log_p_y", "log pi~(y)")
    residual_nll = _statistic("residual_nll", "CE(pi~, p)")
    residual_kl = _statistic("residual_kl", "KL(pi~ || p)")
    teacher_log_p_y = _statistic("teacher_log_p_y", "log pi_T(y)")
    teacher_mass = _statistic("teacher_mass", "pi_T(y) plus the mass of all tokens that pi_T ranks below y")

    def top_evenness(self, k: int) -> Tensor:
        """Entropy of p renormalised over its k most probable tokens, over its maximum log k: in [0, 1]."""
        return self.rows.top_evenness(k).to(self.log_p_y)

    @cached_property
    def p_y(self) -> Tensor:
        return self.log_p_y.exp()

    @property
    def nll(self) -> Tensor:
        return -self.log_p_y

    @property
    def reference_log_p_y(self) -> Tensor:
        """log pi_ref(y): the given column, else the teacher's log-probability of the label."""
        return self.teacher_log_p_y if self.given_reference is None else self.given_reference

    @property
    def reference_mass(self) -> Tensor:
        """Rank mass of y under pi_ref: the given column, else computed from the teacher's logits."""
        return self.teacher_mass if self.given_mass is None else self.given_mass

    def trajectory_means(self, x: Tensor) -> Tensor:
        """(n,) values to (n,) slots: slot i holds the mean over trajectory i, or NaN if no token has that id."""
        ids, zeros = self._ids(x), x.new_zeros(len(x))
        return zeros.index_add(0, ids, x) / zeros.index_add(0, ids, x.new_ones(len(x)))

    def trajectory_mean(self, x: Tensor) -> Tensor:
        """(n,) values to (n,): each token gets the mean over its trajectory."""
        return self.trajectory_means(x)[self._ids(x)]

    def _ids(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x)).long() if self.trajectory is None else self.trajectory


Rule = Callable[[Tokens], "Tensor"] | float


@dataclass(frozen=True)
class Residual:
    """The log-linear pool `pi~(v) ~ p(v)^student * pi_T(v)^teacher`, over the tokens both models can produce.

    (0, 0) is uniform, (1, 0) the student itself, (1/beta, 0) a sharpened student, (0, 1) a teacher or a reference,
    (1 - eta, eta) the guided teacher of Target-SFT. In logits: softmax(student * z + teacher * z_T).
    """

    student: float = 0.0
    teacher: float = 0.0

    @property
    def sums_to_one(self) -> bool:
        """Whether the exponents sum to one, as a top-K teacher needs: the tail of the pool is then a multiple of p."""
        return math.isclose(self.student + self.teacher, 1)

    @property
    def is_student(self) -> bool:
        """Whether pi~ = p. The residual term then has no gradient, and its value is left out of the loss as well."""
        return self.student == 1 and self.teacher == 0


UNIFORM = Residual()
STUDENT = Residual(student=1.0)
TEACHER = Residual(teacher=1.0)


class RowWeights(NamedTuple):
    """The weights that a target gives n tokens; all are (n,) and constant for the gradient."""

    label: Tensor  # w_y = s * gamma
    residual: Tensor  # w_r = s * (1 - gamma)
    scale: Tensor  # s
    trust: Tensor  # gamma


@dataclass(frozen=True)
class Target:
    """A loss of the framework: `Q = trust * delta_y + (1 - trust) * residual`, times `scale`.

    Rules are numbers or functions of `Tokens`, and constant for the gradient.

    Args:
        trust: gamma, the weight of the observed token.
        residual: pi~, the distribution that gets the rest of the weight.
        scale: s, the multiplier of the published method. Two methods with the same Q may differ in it.
        residual_weight: replaces 1 - gamma in signed targets; the share that is then missing from 1 goes to the
            student. GEM (trust 1, residual weight -1) is `Q = delta_y + p - q`.
        value: the per-token loss to report, if the published value is not `w_y * nll + w_r * CE(pi~, p)`. It does not
            change the gradient.
        needs: inputs that the loss cannot do without, among "teacher", "reference" (logits of the initial model),
            "reference_log_p_y" and "reference_mass" (only its log-probability or rank mass of y, which the data may
            hold), "snapshot" (log-probability of y a few updates ago) and "token_weight" (the rules read the column
            themselves; for other targets it multiplies the loss).
        whole_batch: the rules need all tokens at once (trajectory means, batch medians). They get log_p_y of the whole
            batch from one extra pass without gradients, and no vocabulary statistics.
        snapshot_every: for "snapshot", the number of optimizer updates between two snapshots.
    """

    trust: Rule = 1.0
    residual: Residual = STUDENT
    scale: Rule = 1.0
    residual_weight: Rule | None = None
    value: Rule | None = None
    needs: tuple[str, ...] = ()
    whole_batch: bool = False
    snapshot_every: int = 0

    def __post_init__(self) -> None:
        if self.residual.teacher != 0 and not {"teacher", "reference"} & set(self.needs):
            object.__setattr__(self, "needs", (*self.needs, "teacher"))

    def reads_logits(self, columns: Collection[str] = ()) -> bool:
        """Whether the loss reads the whole distribution of a teacher or reference, given these columns of the data."""
        return bool(LOGITS & set(self.needs) - set(columns))

    def reads_model(self, columns: Collection[str] = ()) -> bool:
        """Whether the loss reads a teacher or reference at all, given these columns of the data."""
        return self.reads_logits(columns) or "reference_log_p_y" in set(self.needs) - set(columns)

    def reads_column(self, name: str) -> bool:
        """Whether the loss reads a column of the data: a reference's column only if it needs it, any other always."""
        return name in self.needs or not name.startswith("reference")

    def require(self, *, teacher: bool, columns: Collection[str]) -> None:
        """Raise a ValueError that names the first input that the target needs and does not get.

        Args:
            teacher: whether there are logits of a teacher or reference.
            columns: names of the columns that are given for each token.
        """
        needs, columns = set(self.needs), set(columns)
        if self.reads_logits(columns) and not teacher:
            named = " and ".join(sorted(needs & LOGITS))
            raise ValueError(f"This target needs {named} logits, and no teacher is given: pass teacher=.")
        readable = "reference_log_p_y" in columns or (teacher and not self.whole_batch)
        if needs & {"reference_log_p_y", "snapshot"} and not readable:
            raise ValueError(
                "This target needs the label's log-probability under another model: reference_log_p_y=, or a dense "
                "teacher=."
            )
        if "token_weight" in needs and "token_weight" not in columns:
            raise ValueError("This target reads token_weight, one weight for each token, and none is given.")

    def trusting(self, floor: float = 0.0, token_ids: Sequence[int] = ()) -> Target:
        """The same target with at least `floor` trust in every label, and full trust in labels among `token_ids`.

        The reported value is then that of `s * CE(Q, p)`, since no paper publishes a value for such a mixture.
        """
        if floor == 0 and not token_ids:
            return self

        def trust(tokens: Tokens) -> Tensor:
            gamma = _evaluate(self.trust, tokens).clamp(min=floor)
            certain = (tokens.labels[:, None] == tokens.labels.new_tensor(list(token_ids))).any(-1)
            return gamma.masked_fill(certain, 1.0)

        return replace(self, trust=trust, value=None)

    def weights(self, tokens: Tokens) -> RowWeights:
        """The weights of n tokens. `token_weight` multiplies the scale, unless the rules read the column themselves.

        A token with a trust in the data gets that number as its gamma, whatever the rules and `trusting` say.
        """
        trust = _evaluate(self.trust, tokens)
        if tokens.given_trust is not None:
            trust = trust.where(tokens.given_trust.isnan(), tokens.given_trust.to(trust))
        scale = _evaluate(self.scale, tokens)
        if self._is_weighted(tokens):
            scale = scale * tokens.token_weight
        share = 1 - trust if self.residual_weight is None else _evaluate(self.residual_weight, tokens)
        return RowWeights(scale * trust, scale * share, scale, trust)

    def token_loss(self, weights: RowWeights, tokens: Tokens) -> Tensor:
        """(n,) the value to report, in nats: `Target.value` if there is one, else that of `s * CE(Q, p)`.

        With trusts from the data the value is always that of `s * CE(Q, p)`, as the published values assume the rules.
        """
        if self.value is not None and tokens.given_trust is None:
            value = _evaluate(self.value, tokens)
            return value * tokens.token_weight if self._is_weighted(tokens) else value
        loss = weights.label * tokens.nll
        return loss if self.residual.is_student else loss + weights.residual * tokens.residual_nll

    def target_p_y(self, weights: RowWeights, tokens: Tokens) -> Tensor:
        """(n,) Q(y), the probability that the target gives the label; above 1 or below 0 if Q is signed."""
        share = 1 - weights.trust if self.residual_weight is None else _evaluate(self.residual_weight, tokens)
        pool_p_y = tokens.p_y if self.residual.is_student else tokens.residual_log_p_y.exp()
        return weights.trust + share * pool_p_y + (1 - weights.trust - share) * tokens.p_y

    def _is_weighted(self, tokens: Tokens) -> bool:
        return tokens.token_weight is not None and "token_weight" not in self.needs


def _evaluate(rule: Rule, tokens: Tokens) -> Tensor:
    if callable(rule):
        return rule(tokens).to(tokens.log_p_y)
    return tokens.log_p_y.new_full((len(tokens.log_p_y),), rule)
