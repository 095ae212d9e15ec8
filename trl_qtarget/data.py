"""Numbers beside tokens: a collator that carries per-token columns, and which trajectory a token is part of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


TOKEN_COLUMNS = ("token_weight",)  # columns with one number per token, aligned with input_ids


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
