"""`dataset_conversation`: write prompts and completions from the columns of any dataset.

    dataset_conversation:
      user: "{problem}\nPut your final answer within \\boxed{{}}."
      assistant: "{solution}"

The texts are templates of `str.format`. A field is a column, or a part of a column as in `{messages[1][content]}`.
Write braces that stand for themselves twice.
"""

from collections.abc import Mapping
from string import Formatter
from typing import Any

from .columns import TOKEN_COLUMNS


ROLES = ("system", "user", "assistant")
NAME = "dataset_conversation"


class _Filler(Formatter):
    """`str.format` that refuses None, which a row has for a missing value; str.format would write the word None."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            raise ValueError("a row has no value there")
        return super().format_field(value, format_spec)


def check(conversation: Any) -> None:
    """Check the templates before any data is loaded.

    Raises:
        ValueError: a role is unknown or missing, or a text is no template.
    """
    if not isinstance(conversation, Mapping) or not {"user", "assistant"} <= conversation.keys() <= set(ROLES):
        raise ValueError(f"{NAME} must have text for user, assistant and, if wanted, system; got {conversation!r}.")
    for role, text in conversation.items():
        if not isinstance(text, str):
            raise ValueError(f"{NAME}: {role} must be text with columns in braces, got {text!r}.")
        try:
            fields = [field for _, field, _, _ in Formatter().parse(text) if field is not None]
        except ValueError as mistake:
            raise ValueError(f"{NAME}: {role} is no template ({mistake}); write other braces twice.") from None
        if any(not field or field[0].isdigit() for field in fields):
            raise ValueError(f"{NAME}: {role} has braces without a column; write other braces twice.")


def converse(dataset: Any, conversation: Mapping[str, str]) -> Any:
    """Write each row as a conversation in the columns prompt and completion.

    Token columns stay. All other columns are removed, so that the trainer reads none of them, such as `messages`.

    Raises:
        ValueError: a template names a column that the data does not have, or a row has no value in it.
    """
    first = next(iter(dataset), None)
    if first is None:
        return dataset
    _written(first, conversation)  # reports a mistake before all rows are processed
    unread = [column for column in first if column not in TOKEN_COLUMNS]
    return dataset.map(_written, fn_kwargs={"conversation": conversation}, remove_columns=unread)


def _written(row: Mapping[str, Any], conversation: Mapping[str, str]) -> dict[str, list[dict[str, str]]]:
    """Return the columns prompt and completion of one row; the assistant's turn is the completion."""
    said = {role: _fill(role, conversation[role], row) for role in ROLES if role in conversation}
    turns = [{"role": role, "content": content} for role, content in said.items()]
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def _fill(role: str, text: str, row: Mapping[str, Any]) -> str:
    """Fill the template of a role from a row.

    Raises:
        ValueError: the row has no such column or no value in it.
    """
    try:
        return _Filler().vformat(text, (), row)
    except (LookupError, AttributeError, TypeError, ValueError) as mistake:
        raise ValueError(
            f"{NAME}: {role} cannot be written from the data ({mistake}); the columns are {', '.join(row)}."
        ) from None
