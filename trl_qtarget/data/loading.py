"""Load the splits that the arguments of a recipe name, from the Hub, a folder, a file or `Dataset.save_to_disk`."""

from __future__ import annotations

import copy
import json
import os
import warnings
from pathlib import Path
from typing import Any

from .conversations import converse
from .formats import wrong_columns, wrong_row, wrong_values


BUILDERS = {  # of `datasets`, by the suffix of a file
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
READERS = (*BUILDERS.values(), "text", "xml", "imagefolder", "audiofolder", "videofolder", "webdataset")


def load_splits(script_args, training_args, dataset_args) -> tuple[Any, Any]:
    """Load the training split, and the test split if the run evaluates, else None.

    Raises:
        ValueError: the data cannot be read, has no split of that name, or has rows that `sft` does not read; the
            message names the data.
    """
    data, label = _load_data(script_args, dataset_args)
    options = ["dataset_train_split", *(["dataset_test_split"] if training_args.eval_strategy != "no" else [])]
    splits = [_split(data, option, script_args, label) for option in options]
    prepared = (training_args.dataset_kwargs or {}).get("skip_prepare_dataset")
    for split, option in zip(splits, options, strict=True):
        text_field = None if prepared else training_args.dataset_text_field
        _check(split, f"{label}, split {getattr(script_args, option)!r},", text_field)
    train, evaluation = [*splits, None][:2]
    return train, evaluation


def load_arguments(path: str, **more: Any) -> dict[str, Any]:
    """Return the arguments of `load_dataset` for a name of the Hub, a folder, a file, or a folder of `save_to_disk`.

    `load_dataset` itself takes the first two only, and takes a name such as `text` for a reader, which then reads all
    of the working directory. A saved folder is read by its Arrow files rather than in place, since rows that are
    processed in place leave their cache files in that folder.

    Raises:
        ValueError: the path is the name of a reader.
    """
    folder = Path(path)
    if path in READERS and not folder.exists():
        raise ValueError(f"{path} is a reader, and nothing says which files: set data_files in an entry of `datasets`")
    if folder.suffix in BUILDERS and folder.is_file():
        return {"path": BUILDERS[folder.suffix], "data_files": path, **_given(more)}
    files = _saved_files(folder)
    if files is not None:
        return {"path": "arrow", "data_files": files, **_given(more)}
    return {"path": os.path.join(".", path) if folder.is_dir() else path, **more}


def _given(more: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in more.items() if value is not None}


def _saved_files(folder: Path) -> dict[str, list[str]] | None:
    """Return the Arrow files of a folder that `save_to_disk` made, by split; None for any other folder."""
    if (folder / "dataset_dict.json").is_file():
        names = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return {name: (_saved_files(folder / name) or {}).get("train", []) for name in names}
    if not (folder / "state.json").is_file():
        return None
    files = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
    return {"train": [str(folder / file["filename"]) for file in files]}


def reason(error: BaseException, name: str | None = None) -> str:
    """Return in one line why data cannot be read.

    `datasets` wraps the error of a reader in one that only says that something went wrong.

    name: the data set that was asked for, if it was a single one
    """
    while str(error).startswith("An error occurred while generating the dataset") and error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if type(error).__name__ in ("StopIteration", "SchemaInferenceError") or "corresponds to no data" in str(error):
        return "it has no rows"
    if isinstance(error, KeyError):
        return f"some of its rows have no column {error}"
    if lines and lines[0].startswith("Couldn't cast"):
        return (
            f"its files differ in their columns or in the form of a column ({' '.join(lines)[:200]}): keep them apart"
        )
    if name is not None and not Path(name).exists():
        return f"there is no file or folder of that name here, and {lines[0] if lines else type(error).__name__}"
    if name is not None and Path(name).is_dir() and not any(file.suffix in BUILDERS for file in Path(name).rglob("*")):
        return f"the folder holds no file that ends in {', '.join(BUILDERS)}"
    return lines[0] if lines else type(error).__name__


def _load_data(script_args, dataset_args) -> tuple[Any, str]:
    """Load all splits of `dataset_name`, or of the mixture in `datasets`, and say what the data is called.

    Raises:
        ValueError: the data cannot be read.
    """
    from datasets import load_dataset
    from trl import get_dataset

    name, config = script_args.dataset_name, script_args.dataset_config
    label = f"the data {name}"
    if dataset_args.datasets:
        if name:
            warnings.warn("`datasets` and `dataset_name` are both given: `datasets` is used.", stacklevel=2)
        label = f"the data {', '.join(str(entry.data_files or entry.path) for entry in dataset_args.datasets)}"
    try:
        if dataset_args.datasets:
            return get_dataset(_readable(dataset_args)), label
        return load_dataset(**load_arguments(name, name=config), streaming=script_args.dataset_streaming), label
    except Exception as error:  # readers of a dozen formats raise what they like
        only = name if not dataset_args.datasets else None
        raise ValueError(f"{label} cannot be read: {reason(error, only)}") from error


def _readable(dataset_args) -> Any:
    """Return a mixture whose entries `load_dataset` can read."""
    mixture = copy.copy(dataset_args)
    mixture.datasets = [copy.copy(entry) for entry in dataset_args.datasets]
    for entry in mixture.datasets:
        if entry.data_files is None and entry.data_dir is None:
            for name, value in load_arguments(entry.path).items():
                setattr(entry, name, value)
    return mixture


def _split(data: Any, option: str, script_args, label: str) -> Any:
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


def _check(split: Any, label: str, text_field: str | None) -> None:
    """Refuse data without rows, or with rows that `sft` does not read; without a text field any row is right.

    Raises:
        ValueError: the message says what is wrong with which data.
    """
    try:
        first = next(iter(split), None)
    except Exception as error:  # a stream is read here for the first time
        raise ValueError(f"{label} cannot be read: {reason(error)}") from error
    if first is None:
        raise ValueError(f"{label} has no rows.")
    if text_field is None:
        return
    wrong = wrong_columns(list(first), text_field) or wrong_values(split, text_field) or wrong_row(first, text_field)
    if wrong is not None:
        raise ValueError(f"{label} {wrong}")
