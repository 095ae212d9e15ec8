"""Sequences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from ..theory.reference import IGNORE
from .store import row_key


@dataclass(frozen=True)
class TokenSequence:
    """Tokens that attend to each other, and the labels among them; the first token is nobody's next one."""

    ids: np.ndarray  # (T,)
    labelled: np.ndarray  # (T,) bool

    @property
    def key(self) -> str:
        return row_key(self.ids, self.labelled)

    @property
    def labels(self) -> int:
        return int(self.labelled.sum())


def _sequence(ids: np.ndarray, labels: np.ndarray) -> TokenSequence:
    labelled = labels != IGNORE
    labelled[:1] = False
    return TokenSequence(ids.astype(np.int32), labelled)


def sequences(row: Mapping[str, Any]) -> list[TokenSequence]:
    """Those of a row of the prepared dataset that have labels."""
    ids = np.asarray(row["input_ids"])
    labels = np.asarray(row["labels"]) if "labels" in row else ids
    cuts = np.cumsum(row["seq_lengths"])[:-1] if "seq_lengths" in row else []
    parts = zip(np.split(ids, cuts), np.split(labels, cuts), strict=True)
    return [sequence for sequence in (_sequence(*part) for part in parts) if sequence.labels]


def places(batch: Mapping[str, Any]) -> Iterator[tuple[int, int, TokenSequence]]:
    """(row, start, sequence) of all those in a collated batch that have labels."""
    positions = batch.get("position_ids")
    for row, (ids, labels) in enumerate(zip(batch["input_ids"].numpy(), batch["labels"].numpy(), strict=True)):
        if positions is None:
            mask = batch["attention_mask"][row].numpy()
            starts, end = [int(mask.argmax())], int(mask.argmax() + mask.sum())
        else:
            starts, end = np.flatnonzero(positions[row].numpy() == 0).tolist(), len(ids)
        for start, stop in zip(starts, [*starts[1:], end], strict=True):
            sequence = _sequence(ids[start:stop], labels[start:stop])
            if sequence.labels:
                yield row, start, sequence


def by_name(train: Any, evaluation: Any) -> dict[str, Any]:
    """The datasets of a trainer that are there; an evaluation set may have any name, "train" too."""
    several = evaluation if isinstance(evaluation, dict) else {"": evaluation}
    named = {"train": train, **{f"eval {name}".strip(): dataset for name, dataset in several.items()}}
    return {name: dataset for name, dataset in named.items() if dataset is not None}


def indexed(dataset: Any, name: str, disable: bool = False) -> Iterator[tuple[str, int, int, TokenSequence]]:
    """(key, row, number in the row, sequence) of all sequences of a prepared dataset."""
    columns = [column for column in ("input_ids", "labels", "seq_lengths") if column in dataset.column_names]
    rows = dataset.with_format("numpy", columns=columns)
    for number, row in enumerate(tqdm(rows, f"Hashing {name} dataset", disable=disable, unit=" rows")):
        for part, sequence in enumerate(sequences(row)):
            yield sequence.key, number, part, sequence
