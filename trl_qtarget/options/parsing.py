"""A strict version of TRL's parser: an unknown option or a value of the wrong type ends the run before it starts.

TRL's own parser ignores some unknown options, passes others to accelerate, and does not check the types of YAML
values.
"""

import argparse
import copy
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from trl import TrlParser

from .reading import UNSET, environment, launcher_words, load, nearest, read


SCRIPT = "the script"  # stands for the script's name, which accelerate's parser requires
HUB_TOKEN = r"hf_[A-Za-z0-9]{20,}"


def fail(prog: str, *mistakes: Any, code: int = 2) -> NoReturn:
    """Print each of the user's mistakes in one line, without tokens of the Hub, and exit.

    Rank 0 prints at once, and the launcher then stops the other ranks, so that a mistake is printed once. A mistake
    that only another rank has found is printed there after a pause.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)
    for mistake in mistakes:
        line = " ".join(str(mistake).split())
        print(f"{prog}: {re.sub(HUB_TOKEN, '***', line)}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def reported(prog: str, code: int = 2) -> Iterator[None]:
    """Print a mistake of the user that the block raises in one line, and exit; other errors keep their traceback."""
    try:
        yield
    except Exception as error:
        if (mistake := mistake_of(error)) is None:
            raise
        fail(prog, mistake, code=code)


def mistake_of(error: Exception) -> str | None:
    """Describe an error that is about what the user gave (settings, files, data, packages); None for other errors."""
    from jinja2 import TemplateError
    from safetensors import SafetensorError

    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error}): {error.doc[:80]!r}"
    if isinstance(error, TemplateError):
        return f"the chat template cannot write the data: {type(error).__name__}: {error}"
    if isinstance(error, SafetensorError):
        return f"the weights of a model cannot be read: {error}"
    if isinstance(error, ValueError | OSError | ImportError):
        return str(error)
    of_keywords = isinstance(error, TypeError) and "unexpected keyword argument" in str(error)
    of_trl = type(error) is RuntimeError and "trl" in _raised_in(error).parts  # TRL's answer to mistakes in the data
    return str(error) if of_keywords or of_trl else None


def is_own_sentence(error: Exception) -> bool:
    """Whether this package itself raised an error, so that the message alone says what to do."""
    return type(error) in (ValueError, RuntimeError) and Path(__file__).parents[1] in _raised_in(error).parents


def _raised_in(error: Exception) -> Path:
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename)


@dataclass(frozen=True)
class Parsed:
    """The values of a command line and its YAML file."""

    values: tuple[Any, ...]  # one instance of each dataclass
    options: argparse.Namespace  # the options that belong to no dataclass
    sources: dict[str, str]  # "command line" or the file, by option; defaults are left out
    own: list[str]  # the command line without accelerate's options
    launch: list[str]  # accelerate's options: the file's, then the command line's


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows each option once: not with dashes where it has a spelling with underscores."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = spellings(action)
        return super()._format_action_invocation(shown)


def spellings(action: argparse.Action) -> list[str]:
    """Return the names of an option; of names that differ in `-` and `_` only, the first."""
    return [*reversed({word.replace("-", "_"): word for word in reversed(action.option_strings)}.values())]


class StrictParser(TrlParser):
    """`TrlParser` for `dataclass_types` that refuses options which neither it nor `launcher` has.

    Mistakes end the process with exit code 2 and a line each on stderr. All mistakes of a YAML file are printed.
    """

    def __init__(self, dataclass_types, launcher: argparse.ArgumentParser | None = None, **kwargs):
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self.launcher = launcher
        known = launcher._option_string_actions if launcher else {}
        self.accelerate = {word: action for word, action in known.items() if action.dest != "help"}
        self.hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        self.add_argument("--config", metavar="FILE", help="YAML file of settings; the command line overrides it.")

    def error(self, message: str) -> NoReturn:
        """Print the message in one line and exit; argparse would print the usage before it."""
        fail(self.prog, message)

    @property
    def actions(self) -> list[argparse.Action]:
        """The options of the parser, in the order of its help."""
        return self._actions

    def show_last(self, title: str, names: set[str]) -> None:
        """Move the options of these names into a group of their own at the end of the help."""
        moved = self.add_argument_group(title)._group_actions
        moved += [action for action in self._actions if action.dest in names]
        self._optionals._group_actions = [action for action in self._actions if action not in moved]

    def parse_args_and_config(self, args: Iterable[str] | None = None, **_: Any) -> tuple[Any, ...]:
        """Return one instance of each dataclass; the command line overrides `--config`, which overrides defaults."""
        return self.parse(args).values

    def parse(self, args: Iterable[str] | None = None) -> Parsed:
        """Read `args`, by default the command line of the process, and the YAML file that `--config` names."""
        args = list(sys.argv[1:] if args is None else args)
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", action="append")
        files = finder.parse_known_args(args)[0].config or []
        if len(files) > 1:
            self.error(f"--config is given {len(files)} times, one file is read.")
        sources, launch = self.read_settings(files[0]) if files else ({}, [])
        options = {action.dest for action in self._actions}
        given, left = self.parse_known_args(args, argparse.Namespace(**dict.fromkeys(options, UNSET)))
        sources |= {name: "command line" for name, value in vars(given).items() if value is not UNSET}
        self._check_words(launch, left)
        try:
            *values, rest, _ = self.parse_args_into_dataclasses(args, True, look_for_args_file=False)
        except Exception as mistake:  # the __post_init__ of a dataclass of another package raises what it likes
            self.error(self._told(mistake, given))
        return Parsed(tuple(values), rest, sources, _without(args, left), [*launch, *left])

    def _told(self, mistake: Exception, given: argparse.Namespace) -> str:
        """Describe an error of a dataclass; an error about JSON does not name the option, which this adds."""
        if isinstance(mistake, json.JSONDecodeError):
            values = {action.dest: getattr(given, action.dest, action.default) for action in self._actions}
            names = [name for name, value in values.items() if mistake.doc in (value, self.get_default(name))]
            return f"{names[0] if names else 'a value'} is not JSON ({mistake}): {mistake.doc!r}"
        return (
            str(mistake) if isinstance(mistake, ValueError | ImportError) else f"{type(mistake).__name__}: {mistake}"
        )

    def _check_words(self, launch: list[str], left: list[str]) -> None:
        """Refuse words that are options neither of this parser nor of accelerate."""
        options = [word.partition("=")[0] for word in left if re.match("--?[A-Za-z]", word)]
        known = [word for word in (*self._option_string_actions, *self.accelerate) if word.startswith("--")]
        unknown = [word for word in options if word not in self.accelerate]
        if unknown:
            fail(self.prog, *(f"unknown option {word!r}{nearest(word, known)}" for word in unknown))
        stray = left[0] if left else None
        if self.launcher:
            self.launcher.error = self.error
            stray = self.launcher.parse_args([*launch, *left, SCRIPT]).training_script
        if stray not in (None, SCRIPT):
            self.error(f"unexpected argument {stray!r}: every setting is given by name, see --help")

    def read_settings(self, file: str) -> tuple[dict[str, str], list[str]]:
        """Make the values of a YAML file the defaults; return their sources by name, and accelerate's options."""
        try:
            names, launch, mistakes = self.take(load(file))
        except ValueError as mistake:
            self.error(str(mistake))
        if mistakes:
            fail(self.prog, *(f"{file}: {mistake}" for mistake in mistakes))
        return dict.fromkeys(names, file), launch

    def take(
        self, settings: Iterable[tuple[str, yaml.Node]], others: Iterable[str] = ()
    ) -> tuple[list[str], list[str], list[str]]:
        """Make the settings the defaults; return their names, accelerate's options, and one line for each mistake.

        Args:
            others: keys that belong elsewhere, offered as corrections of an unknown key.
        """
        actions = {action.dest: action for action in self._actions if action.dest in self.hints}
        known = [*actions, *(word[2:] for word in self.accelerate if word.startswith("--")), "env", *others]
        names, launch, mistakes = [], [], []
        for key, node in settings:
            name = key.replace("-", "_")
            try:
                if name == "env":
                    os.environ.update(environment(node))
                elif name in actions:
                    actions[name].required = False
                    if name in names:
                        raise ValueError("is set twice")
                    names.append(name)
                    self.set_defaults(**{name: read(actions[name], self.hints[name], node)})
                elif f"--{name}" in self.accelerate:
                    launch += launcher_words(name, self.accelerate[f"--{name}"], node)
                else:
                    mistakes.append(f"unknown key {key!r}{nearest(key, known)}")
            except ValueError as mistake:
                mistakes.append(f"{key} {mistake}")
        return names, launch, mistakes


def _without(all_words: list[str], removed: list[str]) -> list[str]:
    """Return `all_words` without the words `removed`, which occur in it in the same order."""
    rest = iter(removed)
    gone, kept = next(rest, None), []
    for word in all_words:
        if word == gone:
            gone = next(rest, None)
        else:
            kept.append(word)
    return kept
