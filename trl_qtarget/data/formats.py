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
        return _wrong_tokens(row)
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


def _wrong_tokens(row: Mapping[str, Any]) -> str | None:
    """Describe why a tokenized row cannot be read; None if it can."""
    ids, labels = row["input_ids"], row.get("labels")
    for name, value in (("input_ids", ids), ("labels", labels if labels is not None else ids)):
        if not isinstance(value, list) or not all(type(number) is int for number in value):
            return f"has a row in which {name} is not a list of whole numbers: {_short(value)}"
    if labels is not None and len(labels) != len(ids):
        return f"has a row with {len(ids)} input_ids and {len(labels)} labels"
    return None if min(ids, default=0) >= 0 else f"has a row with a token id below 0: {_short(ids)}"


def wrong_values(dataset: Any, text_field: str) -> str | None:
    """Describe what some rows lack in the columns that `sft` reads, as the end of a sentence; None if none lacks any.

    Such rows come from files of different form that are read as one data set. Streams are not searched.
    """
    if not hasattr(dataset, "num_rows"):
        return None
    choices = (("input_ids",), ("prompt", "completion"), ("conversations",), ("messages",), (text_field,))
    read = next(choice for choice in choices if set(choice) <= set(dataset.column_names))
    for name in read:
        column = dataset.select_columns([name]).with_format("arrow")[:][name]
        missing, mute = _missing(column), _without_content(column)
        if missing:
            others = [other for other in (*EITHER, "conversations", text_field) if other in dataset.column_names]
            others = [other for other in others if other not in read]
            mixed = f", and it has the column {others[0]} too: keep data of different form apart" if others else ""
            return f"has {missing} of {dataset.num_rows} rows without a value for {name}{mixed}"
        if mute:
            return f"has {mute} messages in {name} that have a role and nothing else: a template would write None"
    return None


def _missing(column: Any) -> int:
    """Count the values of an Arrow column that are missing or empty lists."""
    empty = 0
    if _are_lists(column.type):
        compute = _compute()
        empty = compute.sum(compute.equal(compute.list_value_length(column), 0)).as_py() or 0
    return column.null_count + empty


def _without_content(column: Any) -> int:
    """Count the messages of an Arrow column that have nothing but a role; 0 for a column of another type."""
    import pyarrow

    if not _are_lists(column.type) or not pyarrow.types.is_struct(column.type.value_type):
        return 0
    compute, silent = _compute(), 0
    for chunk in column.chunks:
        turns = chunk.flatten()
        mute = pyarrow.array([True] * len(turns))
        for name in (field.name for field in turns.type if field.name not in ("role", "from")):
            mute = compute.and_(mute, compute.is_null(compute.struct_field(turns, name)))
        silent += compute.sum(mute).as_py() or 0
    return silent


def _are_lists(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)


def _compute() -> Any:
    """Return Arrow's functions, which Arrow makes at import, so that no type checker knows them."""
    import pyarrow.compute

    return pyarrow.compute


def _form(value: Any) -> str | None:
    """Return "a text" or "messages"; None for anything else."""
    return "a text" if isinstance(value, str) else "messages" if _are_turns(value, "role") else None


def _are_turns(value: Any, *keys: str) -> bool:
    """Whether the value is a list of mappings that have these keys."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) and {*keys} <= {*v} for v in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
