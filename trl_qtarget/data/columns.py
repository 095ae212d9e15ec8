"""Numbers beside tokens: columns that ride through preparation and collation, and trajectories.

A row of the dataset may carry, for each of its `input_ids` or once for all of them:

    token_weight        multiplies the loss of the token (`critical_token` reads it itself)
    trust               replaces gamma, after `trust_floor` and `trust_token_ids`; null or NaN leave it to the loss
    reference_log_p_y   log pi_ref of the token, for losses that would otherwise load a reference (iw_sft, prift)
    reference_mass      rank mass of the token under pi_ref, for prift with statistic="mass"

One number for the whole row needs no tokenized row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from datasets import Dataset

from ..compat import column_names


TOKEN_COLUMNS = ("token_weight", "trust", "reference_log_p_y", "reference_mass")
REFERENCE_COLUMNS = TOKEN_COLUMNS[2:]  # read behind the row's own prefix


def token_columns(*datasets: Any) -> list[str]:
    """The token columns that every dataset has, of those that are there; one of them may be a dict of several."""
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
    """What `SFTTrainer._prepare_dataset`, whose arguments these are, makes of it, with numbers beside their tokens.

    Rows are tokenized and labelled first. What cuts, drops, packs and shuffles then sees tokens that are vectors, each
    an id and its numbers, and takes them for ids.

    Raises:
        ValueError: a row without one number for each token, or numbers that would be wrong once the row is cut.
    """
    columns = token_columns(dataset)
    if not columns:
        return prepare(dataset, processing_class, args, packing, formatting_func, name)
    _check_prefixes(columns, args, packing)
    options: dict[str, Any] = {"fn_kwargs": {"columns": columns}}
    if isinstance(dataset, Dataset):  # a stream knows no processes
        options["num_proc"] = args.dataset_num_proc
    if "input_ids" not in column_names(dataset):
        dataset = dataset.map(_check_one_number, **options)
    uncut = copy.copy(args)
    uncut.max_length, uncut.shuffle_dataset = None, False
    dataset = prepare(dataset, processing_class, uncut, False, formatting_func, name)
    dataset = dataset.map(_join, remove_columns=columns, **options)
    dataset = prepare(dataset, processing_class, args, packing, None, name)
    return dataset.map(_part, **options)


def _check_prefixes(columns: list[str], args: Any, packing: bool) -> None:
    name = next((name for name in columns if name in REFERENCE_COLUMNS), None)
    if name is None or args.max_length is None:
        return
    option, right = ("packing_strategy", "bfd") if packing else ("truncation_mode", "keep_start")
    given = getattr(args, option)
    if given != right:
        raise ValueError(
            f"The column {name} was computed behind each row's own prefix, and {option}={given!r} gives tokens "
            f"another one: set {option} to {right!r}, or leave the column out."
        )


def _check_one_number(row: dict[str, Any], columns: list[str]) -> dict[str, Any]:
    for name in columns:
        if np.ndim(row[name]):
            raise ValueError(
                f"A row has several numbers in {name} and no input_ids: tokenize it, or give it one number."
            )
    return row


def _join(row: dict[str, Any], columns: list[str]) -> dict[str, Any]:
    """Tokens as vectors: (T, 1 + columns), in float64, which holds every id exactly."""
    labels = row["labels"]
    numbers = [one_number_each(row[name], name, len(labels)) for name in columns]
    learnt = np.asarray(labels) != -100
    for name, x in zip(columns, numbers, strict=True):
        first = int(name in REFERENCE_COLUMNS)  # nothing has predicted the first token
        if name != "trust" and not np.isfinite(x[first:][learnt[first:]]).all():
            raise ValueError(f"A labelled token has no finite number in {name}: give it one, or mask its label.")
    return {"input_ids": np.stack([np.asarray(row["input_ids"], dtype=np.float64), *numbers], axis=1).tolist()}


def _part(row: dict[str, Any], columns: list[str]) -> dict[str, Any]:
    ids, *numbers = np.asarray(row["input_ids"], dtype=np.float64).reshape(-1, 1 + len(columns)).T
    numbers = [x.tolist() for x in numbers]
    return {"input_ids": ids.astype(np.int64).tolist(), **dict(zip(columns, numbers, strict=True))}


def one_number_each(given: Any, name: str, tokens: int) -> np.ndarray:  # (tokens,)
    """One number for each token; None is NaN."""
    x = np.asarray(given, dtype=np.float64)
    if x.ndim == 0:
        return x.repeat(tokens)
    if len(x) != tokens:
        raise ValueError(
            f"A row has {tokens} input_ids and {len(x)} numbers in {name}: it needs one for each, or one for all."
        )
    return x
