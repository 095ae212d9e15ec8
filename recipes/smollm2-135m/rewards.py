"""The rewards of chain.yaml's GRPO: for the right result after `####`, as in the worked solutions, and for any.

TRL's `accuracy_reward` looks for formulas in LaTeX, and these solutions have none.
"""

import re
from decimal import Decimal


RESULT = re.compile(r"####\s*(-?\d+(?:\.\d+)?)\s*$")


def right(completions: list[list[dict]], answer: list[str], **columns) -> list[float]:
    """1 for a solution that ends with the true answer, as a number: 4.0 is 4."""
    found = [RESULT.search(messages[-1]["content"]) for messages in completions]
    return [
        float(made is not None and Decimal(made[1]) == Decimal(true)) for made, true in zip(found, answer, strict=True)
    ]


def ends_with_result(completions: list[list[dict]], **columns) -> list[float]:
    """1 for a solution that ends with a result, right or wrong."""
    return [float(RESULT.search(messages[-1]["content"]) is not None) for messages in completions]
