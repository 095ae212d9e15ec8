"""The numbers beside each token: its label, and numbers from the data or from a second model.

A row of the dataset may carry these columns, with one number for each of its `input_ids` or one number for all:

    token_weight        multiplies the loss of the token (`critical_token` reads it as its trust instead)
    trust               replaces gamma, after `trust_floor` and `trust_token_ids`; null or NaN leave gamma to the loss
    reference_log_p_y   log pi_ref of the token, so that losses such as iw_sft and prift load no reference
    reference_mass      rank mass of the token under pi_ref, for prift with statistic="mass"

A row with one number for all its tokens need not be tokenized; a row with several must be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..theory.reference import IGNORE
from ..theory.target import Tokens


RANGES = {  # by column: the least and the greatest number, which float32 may miss by a little, and the meaning
    "token_weight": (-math.inf, math.inf, "a number that multiplies the loss"),
    "trust": (0.0, 1.0, "gamma, a number from 0 to 1, or null"),
    "reference_log_p_y": (-math.inf, 1e-3, "a log-probability, a number of at most 0"),
    "reference_mass": (0.0, 1.001, "a probability mass, a number from 0 to 1"),
}
TOKEN_COLUMNS = tuple(RANGES)
REFERENCE_COLUMNS = TOKEN_COLUMNS[2:]  # numbers of a token after its own prefix: after another one they are wrong
LOG_P_Y_COLUMN, MASS_COLUMN = REFERENCE_COLUMNS


def shifted(x: Tensor, fill: float = 0) -> Tensor:  # (B, T)
    """Move each number from its token to the position that predicts the token, one to the left."""
    return torch.nn.functional.pad(x[:, 1:], (0, 1), value=fill)


def shifted_labels(batch: dict[str, Any]) -> Tensor:  # (B, T)
    """The labels of a batch, each where it is predicted; sequence parallelism gives batches with shifted labels."""
    return batch["shift_labels"] if "shift_labels" in batch else shifted(batch["labels"], fill=IGNORE)


@dataclass(frozen=True)
class PerToken:
    """Columns of one number per token, all of one shape: (B, T) in a batch, (N,) inside the loss.

    Each number lies at the position that predicts its token, beside the hidden state that the loss reads there.
    """

    labels: Tensor  # IGNORE where there is nothing to learn
    token_weight: Tensor | None = None
    trust: Tensor | None = None  # NaN where gamma is left to the loss
    reference_log_p_y: Tensor | None = None  # nats
    reference_mass: Tensor | None = None
    trajectory: Tensor | None = None  # ids; None: all tokens are one trajectory

    def __len__(self) -> int:
        return len(self.labels)

    def columns(self) -> dict[str, Tensor]:
        """The columns that are given, by name; `labels` always is."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: column for name, column in named.items() if column is not None}

    def flatten(self) -> PerToken:
        """All tokens in one dimension, (N,)."""
        return self._each(lambda column: column.reshape(-1))

    def take(self, rows: Tensor | slice) -> PerToken:
        """The columns of some of the tokens."""
        return self._each(lambda column: column[rows])

    def last(self, width: int) -> PerToken:
        """The last `width` positions of each row, without the virtual tokens that prompt tuning puts before them."""
        return self._each(lambda column: column[:, column.shape[1] - width :])

    def for_rules(self, log_p_y: Tensor, rows: Any) -> Tokens:
        """The `Tokens` that a target's rules read: these columns, log_p_y, and the statistics in `rows`."""
        return Tokens.of(log_p_y, rows, **self.columns())

    def _each(self, function: Callable[[Tensor], Tensor]) -> PerToken:
        return PerToken(**{name: function(column) for name, column in self.columns().items()})
