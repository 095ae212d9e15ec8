"""The columns that supervised fine-tuning reads, and a look at the rows before a model is loaded for them.

TRL decides by the names of the columns and by the first row how all rows are read. Data of another form would end in a
KeyError after the model was loaded, or would be read in another way than its author meant.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


COLUMNS = (("messages",), ("prompt", "completion"), ("conversations",), ("input_ids",))  # any of these sets will do
EITHER = (
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "messages",
)  # TRL looks at one of these, and not always the same


def wrong_columns(columns: Collection[str], text_field: str) -> str | None:
    """Describe why `sft` cannot read data with these columns, as the end of a sentence; None if it can."""
    has = f"has the columns {', '.join(columns)}"
    choices = (*COLUMNS, (text_field,))
    if not any(set(choice) <= set(columns) for choice in choices):
        needed = ", or ".join(" and ".join(choice) for choice in choices)
        return f"{has}: sft reads {needed}; dataset_conversation makes conversations of other columns"
    if "prompt" in columns and not {"completion", "input_ids"} & set(columns):
        return f"{has}: a prompt needs a completion; name the columns to read as `columns` of an entry of `datasets`"
    return None


def wrong_row(row: Mapping[str, Any], text_field: str) -> str | None:
    """Describe why `sft` cannot read a row whose columns are right, as the end of a sentence; None if it can."""
    if "input_ids" in row:
        return None
    forms = {name: _form(row[name]) for name in EITHER if row.get(name) is not None}
    mixed = len(set(forms.values())) > 1
    if "prompt" in row:
        wrong = next((name for name in ("prompt", "completion") if forms.get(name) is None), None)
        expected = "a text or a list of messages with role and content"
    elif forms.get("messages") == "messages" or _are_turns(row.get("conversations"), "from", "value"):
        wrong, expected = None, ""
    elif text_field in row:
        wrong, expected = text_field if not isinstance(row[text_field], str) else None, "a text"
    elif "messages" in row:
        wrong, expected = "messages", "a list of messages with role and content"
    else:
        wrong, expected = "conversations", "a list of messages with from and value"
    if wrong is not None:
        return f"has a row in which {wrong} is not {expected}: {_short(row.get(wrong))}"
    if mixed:
        said = ", ".join(f"{name} is {form or 'something else'}" for name, form in forms.items())
        return f"has rows of mixed form ({said}): name the columns to read as `columns` of an entry of `datasets`"
    return None


def wrong_values(dataset: Any, text_field: str) -> str | None:
    """Describe which column that `sft` reads has rows without a value, as the end of a sentence; None if none has.

    Such rows come from files of different form that are read as one data set. Streams are not searched.
    """
    if not hasattr(dataset, "num_rows"):
        return None
    choices = (("input_ids",), ("prompt", "completion"), ("conversations",), ("messages",), (text_field,))
    read = next(choice for choice in choices if set(choice) <= set(dataset.column_names))
    for name in read:
        missing = _missing(dataset, name)
        if missing:
            others = [other for other in (*EITHER, "conversations", text_field) if other in dataset.column_names]
            others = [other for other in others if other not in read]
            mixed = f", and it has the column {others[0]} too: keep data of different form apart" if others else ""
            return f"has {missing} of {dataset.num_rows} rows without a value for {name}{mixed}"
    return None


def _missing(dataset: Any, name: str) -> int:
    """Count the rows whose value in a column is missing or an empty list."""
    import pyarrow
    import pyarrow.compute

    column = dataset.select_columns([name]).with_format("arrow")[:][name]
    empty = 0
    if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
        lengths = pyarrow.compute.list_value_length(column)
        empty = pyarrow.compute.sum(pyarrow.compute.equal(lengths, 0)).as_py() or 0
    return column.null_count + empty


def _form(value: Any) -> str | None:
    """Return "a text" or "messages"; None for anything else."""
    return "a text" if isinstance(value, str) else "messages" if _are_turns(value, "role") else None


def _are_turns(value: Any, *keys: str) -> bool:
    """Whether the value is a list of mappings that have these keys."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) and {*keys} <= {*v} for v in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
