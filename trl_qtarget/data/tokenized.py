"""A check of rows that arrive tokenized: `input_ids` and `labels` are lists of whole numbers, one each for a token."""

from __future__ import annotations

import reprlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset, IterableDataset

from ..compat import column_names


pc: Any = pyarrow.compute  # whose functions are made when it is imported, so that no type checker knows them
SCANNED = 1000  # rows of a dataset that are checked together
TOKENS, LABELS = "input_ids", "labels"


def check_tokenized(name: str, dataset: Any) -> None:
    """Check a dataset, or several by name, if it has `input_ids`. Of a stream only the first row is checked.

    Other values would end in an error of a data collator or of a kernel that names neither column nor row.

    Raises:
        ValueError: the first row that is wrong, by its number.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_tokenized(f"{name} ({key})", part)
        return
    if not isinstance(dataset, Dataset | IterableDataset) or TOKENS not in column_names(dataset):
        return
    columns = [column for column in (TOKENS, LABELS) if column in column_names(dataset)]
    if isinstance(dataset, IterableDataset):
        first = {column: [row[column]] for row in dataset.take(1) for column in columns}
        dataset = Dataset.from_dict(first) if first else Dataset.from_dict({})
    for start, table in enumerate(dataset.select_columns(columns).with_format("arrow").iter(SCANNED)):
        _check(f"the {name} dataset", table, start * SCANNED)


def _check(where: str, table: pa.Table, start: int) -> None:
    lists = {column: table[column].combine_chunks() for column in table.column_names}
    for column, values in lists.items():
        row = _first_without_numbers(values)
        if row is not None:
            raise ValueError(
                f"Row {start + row} of {where} has {reprlib.repr(values[row].as_py())} in {column}: give a list of "
                "whole numbers, one for each token."
            )
    if LABELS not in lists:
        return
    tokens, labels = (_lengths(lists[column]) for column in (TOKENS, LABELS))
    differing = np.flatnonzero(tokens != labels)
    if differing.size:
        row = int(differing[0])
        raise ValueError(
            f"Row {start + row} of {where} has {tokens[row]} {TOKENS} and {labels[row]} {LABELS}: give one label for "
            "each token, -100 where nothing is to be learned."
        )


def _lengths(lists: pa.Array) -> np.ndarray:
    return pc.call_function("list_value_length", [lists]).to_numpy(zero_copy_only=False)


def _first_without_numbers(values: pa.Array) -> int | None:
    """Return the number of the first row that is no list of whole numbers, None if all are."""
    kind = values.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not (pa.types.is_integer(kind.value_type) or pa.types.is_null(kind.value_type)):
        return 0 if len(values) else None
    if not values.null_count and not values.flatten().null_count:
        return None
    return next(i for i, row in enumerate(values.to_pylist()) if row is None or None in row)
