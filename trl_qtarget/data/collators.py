"""The collator that adds token columns to a batch, and the trajectories of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..loss.per_token import TOKEN_COLUMNS, shifted
from .columns import one_number_each


class WrappedCollator:
    """A collator around another collator; attributes are looked up on the inner one, so TRL finds its settings."""

    def __init__(self, collator: Any):
        self.collator = collator

    def __getattr__(self, name: str) -> Any:
        if name == "collator" or name.startswith("__"):  # pickle looks these up before `__init__` has run
            raise AttributeError(name)
        return getattr(self.collator, name)


EXAMPLE = "qtarget_example"  # (1, T): which row each token of a padding-free batch comes from


class TokenColumnCollator(WrappedCollator):
    """Adds the token columns of the rows to a batch, padded or flattened like the input ids.

    Each number goes to the position that predicts its token, one to the left. The shift happens here and not in the
    loss, because sequence parallelism splits a batch between the two.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        joined = getattr(self.collator, "padding_free", False)
        if joined:
            lengths = torch.tensor([len(example["input_ids"]) for example in examples])
            batch[EXAMPLE] = torch.arange(len(examples)).repeat_interleave(lengths)[None]
        for name in TOKEN_COLUMNS:
            if name not in examples[0]:
                continue
            if "attention_mask" in batch and not batch["attention_mask"][:, 0].all():
                raise ValueError(
                    f"The column {name} needs padding on the right, and this data collator pads on the left: set the "
                    "tokenizer's padding_side to 'right'."
                )
            rows = [one_number_each(example[name], name, len(example["input_ids"])) for example in examples]
            columns = [torch.tensor(row, dtype=torch.float32) for row in rows]
            if joined:
                columns = [torch.cat(columns)]
            padded = pad_sequence(columns, batch_first=True)
            batch[name] = shifted(torch.nn.functional.pad(padded, (0, batch["input_ids"].shape[1] - padded.shape[1])))
        return batch


def trajectories(inputs: dict[str, Any]) -> Tensor:  # (B, T)
    """The id of each token's trajectory: its row, or its document in a row that packs several."""
    labels = inputs["labels"]
    positions = inputs.get("position_ids")
    rows = torch.arange(len(labels), device=labels.device)[:, None]
    if positions is None or positions.dim() != 2:
        return rows.expand_as(labels)
    return (positions == 0).cumsum(-1) + rows * (labels.shape[1] + 1)
