"""Chat templates that print the date of the day: rows that are prepared on another day have other tokens, other keys.

A template reads the date by calling `strftime_now`, which transformers gives to it. Here a macro of that name, put in
front of the template, gives it two different answers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


ANSWERS = "4711", "9862"  # numbers, for a template that computes with the year
MACRO = "{%- macro strftime_now(format) -%} ANSWER {%- endmacro -%}"
USER, ASSISTANT = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Help."}
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
RENDERED: tuple[tuple[list[dict[str, str]], dict[str, Any]], ...] = (
    ([USER, ASSISTANT], {}),
    ([SYSTEM, USER, ASSISTANT], {}),
    ([USER, ASSISTANT], {"tools": [TOOL]}),
)
SHOWN = 24  # characters before the date, by which rows with a date are found


def before_date(tokenizer: Any) -> str | None:
    """Return the text that the chat template prints before the date of the day; None if it prints no date."""
    if not tokenizer.chat_template:
        return None
    for conversation, options in RENDERED:
        texts = [_rendered(tokenizer, conversation, answer, options) for answer in ANSWERS]
        if texts[0] != texts[1]:
            differing = (i for i, (one, other) in enumerate(zip(*texts, strict=False)) if one != other)
            return texts[0][: next(differing, 0)][-SHOWN:].strip().rpartition("\n")[2]
    return None


def _rendered(tokenizer: Any, conversation: list[dict[str, str]], answer: str, options: dict[str, Any]) -> str:
    try:
        template = MACRO.replace("ANSWER", answer) + tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False, **options)
    except Exception:  # a template raises what it likes, as for a system turn that it does not take
        return ""


def dated(tokenizer: Any, rows: Iterable[Any] | None = None) -> str:
    """Explain in a clause that rows hold the date of the day; empty if they do not.

    Args:
        rows: the token ids of each; where they are not known, the template alone decides.
    """
    before = before_date(tokenizer)
    if before is None:
        return ""
    if rows is not None and not any(_squeezed(before) in _squeezed(tokenizer.decode(ids)) for ids in rows):
        return ""
    return (
        f"the chat template prints the date of the day (after {before!r}), so a row has other tokens when it is "
        "prepared on another day. Give `cache` and `sft` a copy of the template with a fixed date: "
        "--chat_template_path FILE.jinja"
    )


def _squeezed(text: str) -> str:
    return "".join(text.split())
