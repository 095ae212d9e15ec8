"""Numbers beside tokens: a collator that carries per-token columns, and which trajectory a token is part of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


TOKEN_COLUMNS = ("token_weight",)  # columns with one number per token, aligned with input_ids


def check_token_columns(dataset: Any, packing: bool, truncation_mode: str) -> Any:
    """The dataset, each of whose rows is checked as it is read: one number of a token column for each of its tokens.

    Raises:
        ValueError: preparation would separate the columns from their tokens, or the rows are not tokenized yet.
    """
    columns = [name for name in TOKEN_COLUMNS if name in (dataset.column_names or ())]
    if not columns:
        return dataset
    name = columns[0]
    if packing:
        raise ValueError(f"Packing would lose the column {name}: set packing to false, or leave the column out.")
    if truncation_mode != "keep_start":
        raise ValueError(f"The column {name} is cut at its end: set truncation_mode to keep_start.")
    if "input_ids" not in dataset.column_names:
        raise ValueError(f"The column {name} has one number a token, so its rows must be tokenized: add input_ids.")

    def check(row: dict[str, Any]) -> dict[str, Any]:
        for column in columns:
            given, tokens = row[column], len(row["input_ids"])
            if given is None or len(given) != tokens:
                count = "none" if given is None else len(given)
                raise ValueError(
                    f"A row has {tokens} input_ids and {count} numbers in {column}: it needs one for each."
                )
        return row

    return dataset.map(check)


def cut_token_columns(dataset: Any) -> Any:
    """The dataset with its token columns as long as the tokens that truncation has left."""
    columns = [name for name in TOKEN_COLUMNS if name in (dataset.column_names or ())]
    if not columns:
        return dataset
    return dataset.map(lambda row: {name: row[name][: len(row["input_ids"])] for name in columns})


class TokenColumnCollator:
    """Wraps a collator: adds the token columns of the rows, padded or flattened as its input ids are."""

    def __init__(self, collator: Any):
        self.collator = collator

    def __getattr__(self, name: str) -> Any:  # whoever configures the wrapped collator finds it here
        return getattr(self.__dict__["collator"], name)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        width = batch["input_ids"].shape[1]
        for name in TOKEN_COLUMNS:
            if name not in examples[0]:
                continue
            if "attention_mask" in batch and not batch["attention_mask"][:, 0].all():
                raise ValueError(f"{name} is placed from the left, where this collator pads: pad on the right.")
            columns = [torch.tensor(example[name], dtype=torch.float32) for example in examples]
            if getattr(self.collator, "padding_free", False):
                columns = [torch.cat(columns)]
            padded = pad_sequence(columns, batch_first=True)
            batch[name] = torch.nn.functional.pad(padded, (0, width - padded.shape[1]))
        return batch


def trajectories(inputs: dict[str, Any]) -> Tensor:  # (B, T)
    """Which trajectory each token is part of: its row, or its document where several are packed into one row."""
    labels = inputs["labels"]
    positions = inputs.get("position_ids")
    rows = torch.arange(len(labels), device=labels.device)[:, None]
    if positions is None or positions.dim() != 2:
        return rows.expand_as(labels)
    return (positions == 0).cumsum(-1) + rows * (labels.shape[1] + 1)
