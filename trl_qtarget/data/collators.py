"""Collators that put numbers beside the tokens of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..loss.per_token import shifted
from .columns import TOKEN_COLUMNS, one_number_each


class WrappedCollator:
    """A collator around another one, whose attributes are found, and configured, through it."""

    def __init__(self, collator: Any):
        self.collator = collator

    def __getattr__(self, name: str) -> Any:
        if name == "collator" or name.startswith("__"):  # unpickled, it is asked for these before it has any attribute
            raise AttributeError(name)
        return getattr(self.collator, name)


class TokenColumnCollator(WrappedCollator):
    """Adds the token columns of the rows, padded or flattened as its input ids are.

    Each number goes where its token is predicted, one position to the left.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        for name in TOKEN_COLUMNS:
            if name not in examples[0]:
                continue
            if "attention_mask" in batch and not batch["attention_mask"][:, 0].all():
                raise ValueError(f"{name} is placed from the left, where this collator pads: pad on the right.")
            rows = [one_number_each(example[name], name, len(example["input_ids"])) for example in examples]
            columns = [torch.tensor(row, dtype=torch.float32) for row in rows]
            if getattr(self.collator, "padding_free", False):
                columns = [torch.cat(columns)]
            padded = pad_sequence(columns, batch_first=True)
            batch[name] = shifted(torch.nn.functional.pad(padded, (0, batch["input_ids"].shape[1] - padded.shape[1])))
        return batch


def trajectories(inputs: dict[str, Any]) -> Tensor:  # (B, T)
    """Which trajectory each token is part of: its row, or its document where several are packed into one row."""
    labels = inputs["labels"]
    positions = inputs.get("position_ids")
    rows = torch.arange(len(labels), device=labels.device)[:, None]
    if positions is None or positions.dim() != 2:
        return rows.expand_as(labels)
    return (positions == 0).cumsum(-1) + rows * (labels.shape[1] + 1)
