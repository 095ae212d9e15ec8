"""Preference pairs for DPO from a model's own samples: a right sample over a wrong sample of the same prompt."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from .problems import Problem
from .report import Sample


FILE = "pairs.jsonl"
COLUMNS = ("prompt", "chosen", "rejected")


def pairs(problems: Sequence[Problem], samples: Sequence[Sample], most: int) -> list[dict[str, Any]]:
    """Return up to `most` pairs per row, in the order of the rows.

    The i-th pair of a row is the i-th right text over the i-th wrong text, where each text counts once. A score of 1
    is right, any lower score wrong. Greedy completions are left out, and so are samples that were cut: a trainer adds
    an end-of-sequence token to every completion, and the model never ended the cut ones. The completions of a row
    whose prompt is a list of messages are messages too.
    """
    right, wrong = defaultdict(dict), defaultdict(dict)  # row -> texts, as dicts that keep the order of the samples
    for sample in sorted(_usable(samples), key=lambda s: (s.row, s.sample)):
        (right if sample.correct else wrong)[sample.row][sample.completion] = None
    return [
        {"prompt": problem.prompt, "chosen": _answer(problem, chosen), "rejected": _answer(problem, rejected)}
        for row, problem in enumerate(problems)
        for chosen, rejected in list(zip(right[row], wrong[row], strict=False))[:most]
    ]


def why_none(samples: Sequence[Sample]) -> str:
    """Explain why the samples make no pair at all, and which options may help."""
    usable = list(_usable(samples))
    if not usable:
        return "no sample ended by itself, and only those make pairs: raise --max_new_tokens"
    rows, right = len({s.row for s in usable}), len({s.row for s in usable if s.correct})
    return (
        f"no row has both a right and a wrong sample: of {rows} rows {right} have right ones alone and {rows - right} "
        "wrong ones alone: take more samples (--k), a higher --temperature, or other problems"
    )


def _usable(samples: Sequence[Sample]) -> Iterator[Sample]:
    """Leave out greedy completions and samples that were cut."""
    return (s for s in samples if s.sample is not None and s.ended)


def _answer(problem: Problem, text: str) -> str | list[dict]:
    """Write the text in the form of the prompt, which is a text or a list of messages."""
    return text if isinstance(problem.prompt, str) else [{"role": "assistant", "content": text}]
