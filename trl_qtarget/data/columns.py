"""Token columns through the preparation of a dataset: tokenizing, truncation, packing and shuffling.

`loss.per_token` lists the columns. TRL's preparation knows nothing of them, and would drop or misplace their numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from datasets import Dataset

from ..compat import column_names
from ..loss.per_token import RANGES, REFERENCE_COLUMNS, TOKEN_COLUMNS
from ..theory.reference import IGNORE
from .tokenized import check_tokenized


def token_columns(*datasets: Any) -> list[str]:
    """The token columns that all given datasets have; a dataset may be None, or a dict of datasets."""
    names: list[Collection[str]] = []
    for dataset in datasets:
        several = dataset.values() if isinstance(dataset, dict) else [dataset]
        names += [column_names(d) for d in several if hasattr(d, "column_names")]
    return [name for name in TOKEN_COLUMNS if names and all(name in found for found in names)]


def prepared(
    prepare: Callable[..., Any],
    dataset: Any,
    processing_class: Any,
    args: Any,
    packing: bool,
    formatting_func: Any,
    name: str,
) -> Any:
    """Prepare a dataset with `prepare`, which is `SFTTrainer._prepare_dataset`, and keep numbers beside their tokens.

    A first call tokenizes and labels the rows. For the second call each token is a vector [id, weight, ...], so that
    truncation, packing and shuffling move every number together with its token.

    Raises:
        ValueError: a row does not have one number for each token, or truncation or packing changes the prefix that the
            numbers of a reference belong to.
    """
    check_tokenized(name, dataset)
    columns = token_columns(dataset)
    if not columns:
        return prepare(dataset, processing_class, args, packing, formatting_func, name)
    _check_prefixes(columns, args, packing)
    options: dict[str, Any] = {"fn_kwargs": {"columns": columns}}
    if isinstance(dataset, Dataset):  # `IterableDataset.map` has no num_proc
        options["num_proc"] = args.dataset_num_proc
    if "input_ids" not in column_names(dataset):
        dataset = dataset.map(_check_one_number, with_indices=True, **options)
    uncut = copy.copy(args)
    uncut.max_length, uncut.shuffle_dataset = None, False
    dataset = prepare(dataset, processing_class, uncut, False, formatting_func, name)
    dataset = dataset.map(_join, with_indices=True, remove_columns=columns, **options)
    dataset = prepare(dataset, processing_class, args, packing, None, name)
    return dataset.map(_split, **options)


def _check_prefixes(columns: list[str], args: Any, packing: bool) -> None:
    name = next((name for name in columns if name in REFERENCE_COLUMNS), None)
    if name is None or args.max_length is None:
        return
    option, right = ("packing_strategy", "bfd") if packing else ("truncation_mode", "keep_start")
    given = getattr(args, option)
    if given != right:
        raise ValueError(
            f"The column {name} holds numbers for each row's own prefix, and {option}={given!r} changes the prefix: "
            f"set {option} to {right!r}, or leave the column out."
        )


def _check_one_number(row: dict[str, Any], index: int, columns: list[str]) -> dict[str, Any]:
    for name in columns:
        if isinstance(row[name], list):
            raise ValueError(
                f"Row {index} has several numbers in {name} and no input_ids: tokenize it, or give it one number."
            )
        one_number_each(row[name], name, 1, f"Row {index}")
    return row


def _join(row: dict[str, Any], index: int, columns: list[str]) -> dict[str, Any]:
    """Replace `input_ids` by vectors [id, number, ...], (T, 1 + columns), in float64, which holds every id exactly."""
    labels = row["labels"]
    numbers = [one_number_each(row[name], name, len(labels), f"Row {index}") for name in columns]
    learnt = np.asarray(labels) != IGNORE
    for name, x in zip(columns, numbers, strict=True):
        first = int(name in REFERENCE_COLUMNS)  # no model predicts the first token
        if name != "trust" and not np.isfinite(x[first:][learnt[first:]]).all():
            raise ValueError(
                f"Row {index} has a labelled token with no finite number in {name}: give it one, or mask its label."
            )
    return {"input_ids": np.stack([np.asarray(row["input_ids"], dtype=np.float64), *numbers], axis=1).tolist()}


def _split(row: dict[str, Any], columns: list[str]) -> dict[str, Any]:
    """Undo `_join`: ids and one list of numbers for each column."""
    ids, *numbers = np.asarray(row["input_ids"], dtype=np.float64).reshape(-1, 1 + len(columns)).T
    numbers = [x.tolist() for x in numbers]
    return {"input_ids": ids.astype(np.int64).tolist(), **dict(zip(columns, numbers, strict=True))}


def one_number_each(given: Any, name: str, tokens: int, whose: str = "A row") -> np.ndarray:  # (tokens,)
    """One number for each token, from one number for each or one for all; None becomes NaN.

    Raises:
        ValueError: no numbers, not one for each token, or a number outside the range of the column.
    """
    try:
        x = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{whose} has {_shown(given)} in {name}. {_RENAME.format(name, RANGES[name][2])}") from None
    if x.ndim and x.shape != (tokens,):
        raise ValueError(
            f"{whose} has {tokens} input_ids and {len(x)} numbers in {name}: it needs one for each, or one for all."
        )
    low, high, meaning = RANGES[name]
    outside = (x < low) | (x > high)
    if outside.any():
        value = x.reshape(-1)[int(outside.reshape(-1).argmax())]
        raise ValueError(f"{whose} has {value:g} in {name}. {_RENAME.format(name, meaning)}")
    return x if x.ndim else x.repeat(tokens)


_RENAME = "The trainer reads the column {0} as {1}: rename the column if it means something else."


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
