"""Losses by name: the `@preset` decorator, the checks of a preset's arguments, and `build`.

A preset's arguments are its function's signature. Their ranges are part of their types, so that one place holds the
default, the range and what the messages say.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from .. import user_code
from .target import Target


@dataclass(frozen=True)
class Range:
    """The range of a preset's argument; `text` says it in a message, with `{}` in place of the argument's name."""

    text: str
    holds: Callable[[float], bool]


AnyReal = Annotated[float, Range("a finite {}", math.isfinite)]
NonNegative = Annotated[float, Range("0 <= {} < inf", lambda x: 0 <= x < math.inf)]
Positive = Annotated[float, Range("0 < {} < inf", lambda x: 0 < x < math.inf)]
Share = Annotated[float, Range("0 <= {} <= 1", lambda x: 0 <= x <= 1)]
PositiveShare = Annotated[float, Range("0 < {} <= 1", lambda x: 0 < x <= 1)]
Count = Annotated[int, Range("a whole {} >= 1", lambda x: x >= 1)]
Several = Annotated[int, Range("a whole {} >= 2", lambda x: x >= 2)]


@dataclass(frozen=True)
class Preset:
    """A named loss: a function from checked arguments to a `Target`, and the paper that published it."""

    name: str
    make: Callable[..., Target]
    paper: str = "-"

    @property
    def summary(self) -> str:
        return inspect.cleandoc(self.make.__doc__ or self.name).split("\n\n")[0]

    @property
    def formula(self) -> str:
        paragraphs = inspect.cleandoc(self.make.__doc__ or "").split("\n\n")
        return paragraphs[1] if len(paragraphs) > 1 else ""

    @property
    def defaults(self) -> dict[str, Any]:
        named = [p for p in self._parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return {p.name: p.default for p in named}

    @property
    def _parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.make).parameters.values())

    @property
    def needs(self) -> tuple[str, ...]:
        """The inputs that the loss needs with default arguments; none if an argument has no default."""
        return self.build().needs if inspect.Parameter.empty not in self.defaults.values() else ()

    @property
    def hints(self) -> dict[str, Any]:
        """Types of the arguments; none if a user's module has annotations that only a type checker can resolve."""
        make: Any = self.make
        while isinstance(make, functools.partial):
            make = make.func
        try:
            return get_type_hints(make, include_extras=True)
        except (NameError, TypeError):  # the latter for a callable that is no function
            return {}

    def build(self, **kwargs: Any) -> Target:
        """The target of the loss with these arguments.

        Raises:
            ValueError: the loss does not take an argument, lacks one, or one is out of its range.
        """
        unknown = [name for name in kwargs if name not in self.defaults]
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in self._parameters):
            takes = ", ".join(self.defaults) or "no arguments"
            raise ValueError(f"Loss {self.name!r} takes {takes}, not {', '.join(unknown)}.")
        absent = [n for n, default in self.defaults.items() if default is inspect.Parameter.empty and n not in kwargs]
        if absent:
            raise ValueError(f"Loss {self.name!r} needs a value for {', '.join(absent)}: pass it in loss_kwargs.")
        arguments = {name: self._checked(name, value) for name, value in kwargs.items()}
        try:
            target = self.make(**arguments)
        except ValueError:  # the loss's own check of its arguments
            raise
        except Exception as error:
            code = getattr(self.make, "__code__", None)
            raised = user_code.told(error, code and code.co_filename)
            raise ValueError(f"Loss {self.name!r} raised {raised}") from error
        if not isinstance(target, Target):
            raise ValueError(f"Loss {self.name!r} must return a Target, it returned {type(target).__name__}.")
        return target

    def _checked(self, name: str, value: Any) -> Any:
        """Return the value of an argument in the type of its hint; hints of other kinds let every value pass.

        Raises:
            ValueError: the value is of another type, or out of range.
        """
        hint = self.hints.get(name)
        members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if value is None and type(None) in members:
            return None
        (hint, *others) = [member for member in members if member is not type(None)] or [None]
        if others:
            return value
        if get_origin(hint) is Literal:
            if value not in get_args(hint):
                accepted = " or ".join(repr(choice) for choice in get_args(hint))
                raise ValueError(f"Loss {self.name!r} needs {name} to be {accepted}, got {value!r}.")
            return value
        kind, accepted = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, None)
        if kind not in CONVERT:
            return value
        text = accepted.text if isinstance(accepted, Range) else f"{CONVERT[kind][0]} for {{}}"
        try:
            converted = CONVERT[kind][1](value)
        except (TypeError, ValueError, OverflowError):
            converted = None
        if converted is None or (isinstance(accepted, Range) and not accepted.holds(converted)):
            raise ValueError(f"Loss {self.name!r} needs {text.format(name)}, got {value!r}.")
        return converted


def _to_float(value: Any) -> float:
    if isinstance(value, bool):  # a number to Python alone
        raise TypeError
    return float(value)  # YAML reads 1e-3 as a text


def _to_int(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise TypeError
    return int(value)


def _to_bool(value: Any) -> bool | None:
    return value if isinstance(value, bool) else {"true": True, "false": False}.get(str(value).lower())


def _to_text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    return str(value)


CONVERT: dict[Any, tuple[str, Callable[[Any], Any]]] = {  # what a hint accepts, and how a value is read
    float: ("a number", _to_float),
    int: ("a whole number", _to_int),
    bool: ("true or false", _to_bool),
    str: ("a text", _to_text),
}


PRESETS: dict[str, Preset] = {}


def preset(name: str, paper: str = "-") -> Callable[[Callable[..., Target]], Callable[..., Target]]:
    """Register the decorated function under `name`; `paper` is an arXiv id. The function itself is returned.

    Raises:
        ValueError: another function has that name.
    """

    def register(make: Callable[..., Target]) -> Callable[..., Target]:
        # a module that is loaded twice registers the same function again: no conflict
        if name in PRESETS and _origin(PRESETS[name].make) != _origin(make):
            raise ValueError(f"A loss named {name!r} exists already: register yours under another name.")
        PRESETS[name] = Preset(name, make, paper)
        return make

    return register


def _origin(function: Callable) -> tuple[str, str]:
    return function.__code__.co_filename, function.__qualname__


GIVEN: dict[str, Preset] = {}  # losses that Python code passed as objects, by the names that `name_of` gave them


def name_of(loss: str | Callable[..., Target] | Target) -> str:
    """A name under which this process finds the loss: configurations are saved, and a function cannot be.

    Raises:
        ValueError: neither a name, nor a function, nor a `Target`.
    """
    if isinstance(loss, str):
        return loss
    made = Preset("Target", lambda: loss) if isinstance(loss, Target) else find_preset(loss)
    if PRESETS.get(made.name) == made:
        return made.name
    number = next(n for n in itertools.count(1) if f"{made.name}#{n}" not in GIVEN)
    same = (name for name, preset in GIVEN.items() if preset.make is made.make)
    name = next(same, f"{made.name}#{number}")
    GIVEN[name] = made
    return name


def find_preset(loss: str | Callable[..., Target]) -> Preset:
    """The preset that `--loss` names: a known name, `my_module:my_loss`, `path/to/file.py:my_loss` or a file with one.

    In Python a function that returns a `Target` is a loss too.

    Raises:
        ValueError: there is no such loss; the message has the nearest names.
    """
    if isinstance(loss, Preset):
        return loss
    if callable(loss):
        known = (preset for preset in PRESETS.values() if preset.make is loss)
        return next(known, Preset(getattr(loss, "__qualname__", type(loss).__name__), loss))
    if not isinstance(loss, str):
        raise ValueError(f"A loss is a name, a function that returns a Target, or a Target, got {loss!r}.")
    if loss in PRESETS or loss in GIVEN:
        return PRESETS.get(loss) or GIVEN[loss]
    if ":" in loss or loss.endswith(".py"):
        return _find_in_module(loss)
    guess = difflib.get_close_matches(loss.lower(), PRESETS, n=1)
    hint = f" Did you mean {guess[0]!r}?" if guess else ""
    raise ValueError(
        f"Unknown loss {loss!r}.{hint} Known losses: {', '.join(sorted(PRESETS))}; "
        "or a loss of your own as my_module:my_loss or my_losses.py:my_loss."
    )


def build(loss: str | Callable[..., Target] | Target, /, **kwargs: Any) -> Target:
    """The `Target` of a loss: `build("target_sft", eta=0.25)`. A `Target` is its own, and takes no arguments.

    Raises:
        ValueError: an unknown name, an argument that the loss does not take, or a value out of range; the message says
            what is accepted.
    """
    if isinstance(loss, Target):
        if kwargs:
            raise ValueError(f"A Target takes no arguments, got {', '.join(kwargs)}: set them in the Target itself.")
        return loss
    return find_preset(loss).build(**kwargs)


def _find_in_module(loss: str) -> Preset:
    source, name = user_code.split(loss)
    before = set(PRESETS)
    try:
        module = user_code.load(source)
    except user_code.NotFound as reason:
        raise ValueError(
            f"Unknown loss {loss!r}: {reason}. Give my_module:my_loss, or my_losses.py:my_loss for a file."
        ) from None
    except (Exception, SystemExit) as error:  # the module's own code runs
        raised = user_code.told(error, user_code.file_of(source))
        raise ValueError(f"Loss {loss!r}: importing {source} failed with {raised}") from error
    own = [p for p in PRESETS.values() if p.make.__module__ == module.__name__]
    if not name:
        if len(own) != 1:
            names = ", ".join(sorted(p.name for p in own)) or "none"
            raise ValueError(f"{source} registers these losses: {names}. Say which, as {source}:NAME.")
        return own[0]
    made: Any = getattr(module, name, None)
    by_name = {p.name: p for p in own}
    if name in by_name:
        return by_name[name]
    if made is not None and not _makes_a_target(made, module):
        raise ValueError(
            f"{loss} has no decorator @preset and no return annotation `-> Target`: add one of the two. A recipe "
            "may only call functions that are marked as losses."
        )
    if made is None:
        choices = sorted({*by_name, *(set(PRESETS) - before)}) or [n for n in vars(module) if not n.startswith("_")]
        guess = difflib.get_close_matches(name, choices, n=1)
        hint = f" Did you mean {source}:{guess[0]}?" if guess else ""
        raise ValueError(f"{source} has no loss {name!r}.{hint}")
    return next((p for p in own if p.make is made), Preset(loss, cast(Any, made)))


def _makes_a_target(made: Any, module: Any) -> bool:
    """Whether `made` is meant as a loss: a function defined in this module whose annotation says it returns a Target.

    A recipe names a loss by text; without this check the text could call any function that a module imports.
    """
    returns = getattr(made, "__annotations__", {}).get("return")
    return getattr(made, "__module__", None) == module.__name__ and returns in (Target, "Target")
