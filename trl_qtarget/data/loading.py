"""Load the splits that the arguments of a recipe name."""

from __future__ import annotations

import warnings
from typing import Any

from .conversations import converse


def load_splits(script_args, training_args, dataset_args) -> tuple[Any, Any]:
    """Load the training split, and the test split if the run evaluates, else None.

    Raises:
        ValueError: the data has no split of that name, or its rows cannot be written as conversations.
    """
    data = _load_data(script_args, dataset_args)
    evaluates = training_args.eval_strategy != "no"
    return (
        _split(data, "dataset_train_split", script_args),
        _split(data, "dataset_test_split", script_args) if evaluates else None,
    )


def _load_data(script_args, dataset_args) -> Any:
    """Load all splits of `dataset_name`, or of the mixture in `datasets`."""
    from datasets import load_dataset
    from trl import get_dataset

    if not dataset_args.datasets:
        name, config = script_args.dataset_name, script_args.dataset_config
        return load_dataset(name, name=config, streaming=script_args.dataset_streaming)
    if script_args.dataset_name:
        warnings.warn("`datasets` and `dataset_name` are both given: `datasets` is used.", stacklevel=2)
    return get_dataset(dataset_args)


def _split(data: Any, option: str, script_args) -> Any:
    """Take the split that `option` names, and write its rows as conversations if the recipe says how."""
    name = getattr(script_args, option)
    if name not in data:
        raise ValueError(
            f"The data has no split {name!r}, it has {', '.join(map(repr, data))}: pass --{option}, or for the test "
            "split of `datasets` set test_split_size."
        )
    if script_args.dataset_conversation is None:
        return data[name]
    return converse(data[name], script_args.dataset_conversation)
