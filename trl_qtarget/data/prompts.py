"""The token ids of a prompt, as training has them in front of the completion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


# Beginnings of a completion, of kinds that a tokenizer does not join to the same text before them
PROBES = ("a", "0", "(", " a", "\n")


def prompt_ids(
    tokenizer: Any, prompt: str | Sequence[Mapping[str, Any]], row: Mapping[str, Any] | None = None
) -> list[int]:
    """Return the ids that a model is to continue, for a prompt that is a text or a list of messages.

    SFTTrainer trains the completion behind the first ids that the prompt alone and the prompt with its completion have
    in common. A token that the tokenizer puts behind every text, such as an end of sequence, is not among them, nor is
    an end of the generation prompt that the chat template leaves out in front of an answer: no model was trained to
    answer behind those. As the completion is not known here, several beginnings of one are tried, and the longest
    common prefix counts: a token that only some completions change is part of the prompt.

    row: a row of the data, whose columns `tools` and `chat_template_kwargs` go into the template, as in training
    """
    if isinstance(prompt, str):
        alone, continued = _ids(tokenizer(prompt)), (_ids(tokenizer(prompt + probe)) for probe in PROBES)
    else:
        options = _template_options(row or {})
        alone = _ids(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options))
        answers = ([*prompt, {"role": "assistant", "content": probe}] for probe in PROBES)
        continued = (_ids(tokenizer.apply_chat_template(answer, **options)) for answer in answers)
    shared = []
    for ids in continued:
        if ids != alone:  # else the tokenizer drops the probe
            shared.append(common_prefix(alone, ids))
        if shared and shared[-1] == len(alone):
            break
    return alone[: max(shared, default=len(alone))]


def common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return the number of first ids that two sequences have in common."""
    same = (i for i, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other)
    return next(same, min(len(ids), len(others)))


def _ids(encoded: Mapping[str, list[int]]) -> list[int]:
    return list(encoded["input_ids"])


def _template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the chat template that SFTTrainer takes from a row."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, "return_dict": True, **(row.get("chat_template_kwargs") or {})}
