"""Preferences from a model's own samples: a right one over a wrong one of the same prompt, as DPO reads them."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from .problems import Problem
from .report import Sample


FILE = "pairs.jsonl"
COLUMNS = ("prompt", "chosen", "rejected")


def pairs(problems: Sequence[Problem], samples: Sequence[Sample], most: int) -> list[dict[str, Any]]:
    """Up to `most` pairs a row, in the rows' order: its i-th right text over its i-th wrong one, each text once.

    Right is a score of 1, wrong any lower one. Greedy completions and samples that were cut are left out: a trainer
    ends every completion, so a cut one would become a text that the model never wrote. Messages stay messages.
    """
    right, wrong = defaultdict(dict), defaultdict(dict)  # row -> texts, in the order of the samples
    for sample in sorted(_usable(samples), key=lambda s: (s.row, s.sample)):
        (right if sample.correct else wrong)[sample.row][sample.completion] = None
    return [
        {"prompt": problem.prompt, "chosen": _answer(problem, chosen), "rejected": _answer(problem, rejected)}
        for row, problem in enumerate(problems)
        for chosen, rejected in list(zip(right[row], wrong[row], strict=False))[:most]
    ]


def why_none(samples: Sequence[Sample]) -> str:
    """Why there is not one pair, and what may help."""
    usable = list(_usable(samples))
    if not usable:
        return "no sample ended by itself, and only those make pairs: raise --max_new_tokens"
    rows, right = len({s.row for s in usable}), len({s.row for s in usable if s.correct})
    return (
        f"no row has both a right and a wrong sample: of {rows} rows {right} have right ones alone and {rows - right} "
        "wrong ones alone: take more samples (--k), a higher --temperature, or other problems"
    )


def _usable(samples: Sequence[Sample]) -> Iterator[Sample]:
    return (s for s in samples if s.sample is not None and s.ended)


def _answer(problem: Problem, text: str) -> str | list[dict]:
    return text if isinstance(problem.prompt, str) else [{"role": "assistant", "content": text}]
