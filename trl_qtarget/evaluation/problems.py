"""Read problems with checkable answers from a file, a folder or the Hub."""

import csv
import difflib
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One problem: the prompt (a text or messages), the right answer as text, and the whole row for the verifier."""

    prompt: str | list[dict]
    answer: str
    row: dict


def read_problems(
    dataset: str,
    config: str | None = None,
    split: str | None = None,
    prompt_column: str = "prompt",
    answer_column: str = "answer",
    max_rows: int | None = None,
) -> list[Problem]:
    """Read the first `max_rows` rows, or all rows, as problems.

    Raises:
        ValueError: the data set, split or column does not exist, or a row has no prompt or no answer.
    """
    path = Path(dataset)
    if path.suffix in READERS:
        if not path.is_file():
            raise ValueError(f"The dataset file {dataset} does not exist.")
        if split is not None or config is not None:
            raise ValueError(
                f"The dataset {dataset} is a file without splits and configurations: leave out --dataset_split and "
                "--dataset_config."
            )
        rows = read_file(path)
    else:
        rows = load_split(dataset, config, split)
    rows = list(islice(rows, max_rows))
    if not rows:
        raise ValueError(f"The dataset {dataset} has no rows.")
    return [problem(i, row, prompt_column, answer_column) for i, row in enumerate(rows)]


def read_file(path: Path) -> list[dict]:
    """Read the rows of a file whose suffix is one of `READERS`.

    Raises:
        ValueError: the file cannot be read, or holds something else than rows.
    """
    try:
        rows = READERS[path.suffix](path)
    except (ValueError, OSError) as error:  # the errors of JSON, UTF-8 and Arrow are ValueErrors
        raise ValueError(f"The dataset file {path} cannot be read: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"The dataset file {path} must hold a list of rows, each with its columns by name.")
    return rows


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        if "Extra data" not in str(error):
            raise
        return read_jsonl(path)  # one row per line: what `Dataset.to_json` writes


def read_jsonl(path: Path) -> Any:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def read_csv(path: Path) -> Any:
    with path.open(encoding="utf-8", newline="") as file:  # every value stays text, so that 007 is not 7
        return list(csv.DictReader(file))


def read_parquet(path: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


READERS = {".json": read_json, ".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}


def load_split(dataset: str, config: str | None, split: str | None) -> Any:
    """Load one split of a folder or Hub data set with `datasets`; without a name the only split, or `test`.

    Raises:
        ValueError: the data set cannot be loaded, or has no such split.
    """
    import datasets

    saved = any(Path(dataset, name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        loaded = datasets.load_from_disk(dataset) if saved else datasets.load_dataset(dataset, config)
    except Exception as error:  # datasets raises a dozen types of error
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(f"The dataset {dataset!r} cannot be loaded: {first_line}") from error
    if not isinstance(loaded, dict):
        return loaded
    splits = [str(name) for name in loaded]
    if split is None and (len(splits) == 1 or "test" in splits):
        split = "test" if "test" in splits else splits[0]
    if split not in splits:
        raise ValueError(f"--dataset_split must be one of {', '.join(splits)}, not {split}.")
    return loaded[split]


def problem(i: int, row: dict, prompt_column: str, answer_column: str) -> Problem:
    """Check row number `i` and make a problem of it.

    Raises:
        ValueError: a column is missing, or its value is no prompt or no answer.
    """
    for option, column in (("prompt_column", prompt_column), ("answer_column", answer_column)):
        if column not in row:
            guess = difflib.get_close_matches(column, row, n=1, cutoff=0.4)
            hint = f" Did you mean --{option} {guess[0]}?" if guess else ""
            raise ValueError(f"Row {i} has no column {column!r}; it has {', '.join(map(str, row))}.{hint}")
    prompt, answer = row[prompt_column], row[answer_column]
    if not (isinstance(prompt, str) or is_conversation(prompt)):
        raise ValueError(f"The prompt of row {i} must be a text or a list of messages, it is {prompt!r}.")
    if not isinstance(answer, str | int | float):
        raise ValueError(f"The answer of row {i} must be a text or a number, it is {answer!r}.")
    return Problem(prompt, str(answer), row)


def is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and "role" in m for m in prompt)
