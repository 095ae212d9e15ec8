"""Verifiers decide whether a completion is right: `exact`, `math`, or a function that the user names.

A function is named `module:function` or `path/to/file.py:function`. It is called as `verify(completion, answer, row)`
and returns a bool or a number from 0 to 1. `row` is the row of the dataset; `row["_ended"]` says whether the model
ended the completion itself, and a parameter named `ended` receives the same value.
"""

import inspect
from collections.abc import Callable
from typing import Any

from .. import user_code


Verifier = Callable[[str, str, dict], float]  # completion, answer, row with "_ended" -> 0 to 1


def find_verifier(name: str) -> Verifier:
    """Return the verifier that `--verifier` names.

    Raises:
        ValueError: no such verifier, a package that it needs is not installed, or its parameters are wrong.
    """
    if name == "exact":
        return exact
    if name == "math":
        return MathVerifier()
    source, function = user_code.split(name)
    if not (source and function):
        raise ValueError(
            f"Unknown verifier {name!r}: give exact, math, or a function of yours as module:function or "
            "path/to/file.py:function."
        )
    try:
        module = user_code.load(source)
    except user_code.NotFound as reason:
        raise ValueError(
            f"Unknown verifier {name!r}: {reason}. Give my_module:function, or path/to/file.py:function for a file."
        ) from None
    except (Exception, SystemExit) as error:  # the module's own code runs
        raised = user_code.told(error, user_code.file_of(source))
        raise ValueError(f"Verifier {name!r}: importing {source} failed with {raised}") from error
    made = getattr(module, function, None)
    if not callable(made):
        raise ValueError(f"{source} has no function {function!r}.")
    return checked(name, made)


def exact(completion: str, answer: str, row: dict) -> float:
    """Return 1 if completion and answer are the same text up to white space around them, else 0."""
    return float(completion.strip() == answer.strip())


class MathVerifier:
    """The judgement of math-verify: completion and answer are compared as mathematical expressions."""

    def __init__(self):
        try:
            from math_verify import parse, verify
        except ImportError:
            raise ValueError(
                "The verifier math needs the package math-verify: "
                'pip install "trl-qtarget[bench]", or give another --verifier.'
            ) from None
        self.parse, self.verify = parse, verify
        self.parsed: dict[str, list] = {}

    def gold(self, answer: str) -> list:
        """Parse a right answer into expressions; called before a model is loaded, it finds bad answers early.

        Raises:
            ValueError: math-verify finds no expression in the answer.
        """
        if answer not in self.parsed:
            # in some formulas math-verify finds nothing unless there are dollars around them
            self.parsed[answer] = self.parse(answer) or self.parse(f"${answer}$")
        if all(isinstance(part, str) for part in self.parsed[answer]):  # text that math-verify could not read
            raise ValueError(f"math-verify finds no expression in the answer {answer!r}: give another --verifier.")
        return self.parsed[answer]

    def __call__(self, completion: str, answer: str, row: dict) -> float:
        return float(self.verify(self.gold(answer), self.parse(completion)))


def checked(name: str, function: Callable[..., Any]) -> Verifier:
    """Wrap a user's function: pass `ended` if it has that parameter, and refuse results that are no score.

    Raises:
        ValueError: the function does not take (completion, answer, row).
    """
    parameters = inspect.signature(function).parameters.values()
    takes_ended = any(p.name == "ended" and p.kind is not p.POSITIONAL_ONLY for p in parameters)
    try:
        inspect.signature(function).bind("completion", "answer", {}, **({"ended": True} if takes_ended else {}))
    except TypeError as error:
        raise ValueError(f"Verifier {name} must take (completion, answer, row): {error}.") from None

    def verifier(completion: str, answer: str, row: dict) -> float:
        try:
            result = function(completion, answer, row, **({"ended": row["_ended"]} if takes_ended else {}))
        except Exception as error:
            file = inspect.getsourcefile(function)
            raise ValueError(f"Verifier {name} raised {user_code.told(error, file)}.") from error
        try:
            score = float(result)
        except (TypeError, ValueError):
            score = -1.0
        if not 0 <= score <= 1:
            raise ValueError(f"Verifier {name} returned {result!r}; it must return a bool or a number from 0 to 1.")
        return score

    return verifier
