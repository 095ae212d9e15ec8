"""The sequences that a teacher scores: in a row of the prepared data, in a whole dataset, and in a collated batch.

A sequence is a row of the prepared dataset, or one document of a packed row. Its key depends on its token ids and on
which of them are labels, and on nothing else: shuffling, packing, padding and epochs do not change it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from ..data.tokenized import check_tokenized
from ..theory.reference import IGNORE
from .fingerprints import row_key
from .shards import CacheError


@dataclass(frozen=True)
class TokenSequence:
    """Tokens that attend to each other, and which of them are labels.

    The first token is never a label: no position of the sequence predicts it.
    """

    ids: np.ndarray  # (T,)
    labelled: np.ndarray  # (T,) bool

    @property
    def key(self) -> str:
        return row_key(self.ids, self.labelled)

    @property
    def labels(self) -> int:
        return int(self.labelled.sum())


def row_sequences(row: Mapping[str, Any]) -> list[TokenSequence]:
    """Return the sequences with labels in one row of the prepared dataset.

    Raises:
        CacheError: a label is another one than its token.
    """
    ids = np.asarray(row["input_ids"])
    labels = np.asarray(row["labels"]) if "labels" in row else ids
    cuts = np.cumsum(row["seq_lengths"])[:-1] if "seq_lengths" in row else []
    parts = zip(np.split(ids, cuts), np.split(labels, cuts), strict=True)
    return [sequence for sequence in (_sequence(*part) for part in parts) if sequence.labels]


def dataset_sequences(dataset: Any, name: str, disable: bool = False) -> Iterator[tuple[str, int, int, TokenSequence]]:
    """Yield (key, row, number within the row, sequence) for every sequence with labels in a prepared dataset.

    Raises:
        ValueError: a row is not tokenized as a cache needs it; the message names the row.
    """
    check_tokenized(name, dataset)
    columns = [column for column in ("input_ids", "labels", "seq_lengths") if column in dataset.column_names]
    rows = dataset.with_format("numpy", columns=columns)
    for number, row in enumerate(tqdm(rows, f"Hashing {name} dataset", disable=disable, unit=" rows")):
        try:
            sequences = row_sequences(row)
        except CacheError as mistake:
            raise CacheError(f"Row {number} of the {name} dataset: {mistake}") from None
        for part, sequence in enumerate(sequences):
            yield sequence.key, number, part, sequence


def batch_sequences(batch: Mapping[str, Any]) -> Iterator[tuple[int, int, TokenSequence]]:
    """Yield (row, start, sequence) for every sequence with labels in a collated batch, packed or padded.

    Raises:
        CacheError: the batch does not tell where its sequences are, or a label is another one than its token.
    """
    positions = batch.get("position_ids")
    lacking = [name for name in ("input_ids", "labels") if name not in batch]
    if positions is None and "attention_mask" not in batch:
        lacking.append("attention_mask, or position_ids where rows are joined")
    if lacking:
        raise CacheError(
            f"The batches of this data collator have no {', no '.join(lacking)}: a teacher cache finds its rows by "
            "them. Let the collator return them, or leave teacher_cache out."
        )
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
    """Return a trainer's datasets under names for messages: "train", "eval", or "eval NAME" where there are several.

    The prefix keeps an evaluation set that is called "train" apart from the training data. A missing dataset is left
    out.
    """
    several = evaluation if isinstance(evaluation, dict) else {"": evaluation}
    named = {"train": train, **{f"eval {name}".strip(): dataset for name, dataset in several.items()}}
    return {name: dataset for name, dataset in named.items() if dataset is not None}


def _sequence(ids: np.ndarray, labels: np.ndarray) -> TokenSequence:
    labelled = labels != IGNORE
    labelled[:1] = False
    if (other := np.flatnonzero(labelled & (labels != ids))).size:
        at = other[0]
        raise CacheError(
            f"the token {ids[at]} has the label {labels[at]}, and a teacher cache is of the tokens themselves: give "
            "labels that equal input_ids, or -100, or leave teacher_cache out."
        )
    return TokenSequence(ids.astype(np.int32), labelled)
