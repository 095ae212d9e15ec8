"""Is a completion right? `exact`, `math`, or a function of the user's: `module:function`, `path/to/file.py:function`.

A user's function is called as `verify(completion, answer, row)` and returns a bool or a number from 0 to 1. `row` is
the dataset's row, with `row["_ended"]`: whether the model ended the completion itself. A function with a parameter
named `ended` gets it there too.
"""

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


Verifier = Callable[[str, str, dict], float]  # completion, answer, row with "_ended" -> 0 to 1


def find_verifier(name: str) -> Verifier:
    """The verifier of that name.

    Raises:
        ValueError: no such verifier, a package it needs is not installed, or a function that cannot be called so.
    """
    if name == "exact":
        return exact
    if name == "math":
        return MathVerifier()
    if ":" not in name:
        raise ValueError(
            f"Unknown verifier {name!r}: give exact, math, or a function of yours as module:function or "
            "path/to/file.py:function."
        )
    return checked(name, load_function(name))


def exact(completion: str, answer: str, row: dict) -> float:
    """1 if completion and answer are the same text, white space around them aside."""
    return float(completion.strip() == answer.strip())


class MathVerifier:
    """math-verify's judgement of the expression a completion arrives at and the answer, as mathematics."""

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
        """The answer's expressions; called beforehand, it finds bad answers before a model is loaded."""
        if answer not in self.parsed:
            # a formula without dollars around it is read as the formula it is
            self.parsed[answer] = self.parse(answer) or self.parse(f"${answer}$")
        if all(isinstance(part, str) for part in self.parsed[answer]):  # text that stands for nothing it understood
            raise ValueError(f"math-verify finds no expression in the answer {answer!r}: give another --verifier.")
        return self.parsed[answer]

    def __call__(self, completion: str, answer: str, row: dict) -> float:
        return float(self.verify(self.gold(answer), self.parse(completion)))


def checked(name: str, function: Callable[..., Any]) -> Verifier:
    """A user's function, called as it can be called, its result checked."""
    parameters = inspect.signature(function).parameters.values()
    takes_ended = any(p.name == "ended" and p.kind is not p.POSITIONAL_ONLY for p in parameters)
    try:
        inspect.signature(function).bind("completion", "answer", {}, **({"ended": True} if takes_ended else {}))
    except TypeError as error:
        raise ValueError(f"Verifier {name} must take (completion, answer, row): {error}.") from None

    def verifier(completion: str, answer: str, row: dict) -> float:
        result = function(completion, answer, row, **({"ended": row["_ended"]} if takes_ended else {}))
        try:
            score = float(result)
        except (TypeError, ValueError):
            score = -1.0
        if not 0 <= score <= 1:
            raise ValueError(f"Verifier {name} returned {result!r}; it must return a bool or a number from 0 to 1.")
        return score

    return verifier


def load_function(name: str) -> Callable[..., Any]:
    source, _, attribute = name.rpartition(":")
    module = load_file(source) if source.endswith(".py") else load_module(source)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"{source} has no function {attribute!r}.")
    return function


def load_file(source: str):
    path = Path(source).resolve()
    if not path.is_file():
        raise ValueError(f"There is no file {source}.")
    spec = importlib.util.spec_from_file_location(f"verifier_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_module(source: str):
    # a console script, unlike `python -m`, does not look into the folder it is started in
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if not source.startswith(str(error.name)):
            raise  # the module is there, something it imports is not
        raise ValueError(f"There is no module {source!r} here or on the Python path.") from None
