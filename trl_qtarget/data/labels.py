"""The labels that preparation has left in a dataset. A run without labels trains nothing and reports a loss of 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from ..theory.reference import IGNORE


ROWS = 1000  # of a dataset that are counted together


class Labels(NamedTuple):
    """Counts of the sequences of a prepared dataset; a packed row holds several."""

    sequences: int
    unlabelled: int  # no label left
    cut: int  # as long as max_length, so probably truncated


def count_labels(dataset: Dataset, max_length: int | None) -> Labels:
    """Count the sequences of a prepared dataset, and those that preparation has left without a label."""
    counted = [_count(*part, max_length) for part in _tables(dataset)]
    return Labels(*(sum(column) for column in zip(*counted, strict=True))) if counted else Labels(0, 0, 0)


def _tables(dataset: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the flat labels and the sequence lengths of some rows at a time."""
    name = "labels" if "labels" in dataset.column_names else "input_ids"
    kept = [column for column in (name, "seq_lengths") if column in dataset.column_names]
    tables: Any = dataset.select_columns(kept).with_format("arrow").iter(ROWS)
    for table in tables:
        lists = table[name].combine_chunks()
        lengths = lists.value_lengths()
        if "seq_lengths" in kept:
            lengths = table["seq_lengths"].combine_chunks().flatten()
        yield lists.flatten().to_numpy(zero_copy_only=False), lengths.to_numpy(zero_copy_only=False)


def _count(labels: np.ndarray, lengths: np.ndarray, max_length: int | None) -> Labels:
    lengths = lengths[lengths > 0]
    ends = np.cumsum(lengths)
    labelled = labels != IGNORE
    labelled[ends - lengths] = False  # nothing predicts the first token of a sequence
    before = np.concatenate([[0], np.cumsum(labelled)])
    left = before[ends] - before[ends - lengths]
    cut = 0 if max_length is None else int((lengths >= max_length).sum())
    return Labels(len(lengths), int((left == 0).sum()), cut)


def report(columns: Sequence[str], given: Mapping[str, Any], prepared: Mapping[str, Any], args: Any) -> Iterator[str]:
    """Lines on the token columns that are read, and on the rows that preparation has cut or left without a label.

    Args:
        columns: token columns that all datasets have.
        given, prepared: the datasets by name, before and after preparation; a stream is seen batch by batch only.
        args: the `SFTConfig` that they were prepared with.

    Raises:
        ValueError: no row of a dataset has a label left.
    """
    if columns:
        yield f"Columns of the data that are read beside the tokens: {', '.join(columns)}"
    for name, dataset in prepared.items():
        if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:  # images: collators tokenize
            continue
        found, before = count_labels(dataset, args.max_length), given.get(name)
        # TRL drops rows that truncation has left without a label; wrapped packing leaves no trace of rows
        wrapped = args.packing and "seq_lengths" not in dataset.column_names
        rows = len(before) if isinstance(before, Sized) and not wrapped else found.sequences
        yield from _describe(name, found, rows, args.max_length)


def _describe(name: str, found: Labels, rows: int, max_length: int | None) -> Iterator[str]:
    limit = "" if max_length is None else f" after max_length={max_length}"
    lost = rows - found.sequences + found.unlabelled
    if found.unlabelled == found.sequences:
        raise ValueError(
            f"None of the {rows} rows of the {name} dataset has a label left{limit}: raise max_length if prompts are "
            "longer than it, or look at the columns that mask labels (completion_mask, assistant_masks, labels)."
        )
    parts = [
        f"{lost} of {rows} rows have no label left{limit}" if lost > 0 else "",
        f"{found.cut} of {rows} rows are as long as max_length, so probably cut" if found.cut else "",
    ]
    if any(parts):
        yield f"{name.capitalize()} dataset: {'; '.join(filter(None, parts))}"
