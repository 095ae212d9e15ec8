"""TRL's parser, made strict: a word that nobody knows, or a value of the wrong type, ends the run before it starts.

TRL's own parser ignores some unknown words, hands others to accelerate, and takes YAML values as they are.
"""

import argparse
import copy
import os
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, get_type_hints

import yaml
from trl import TrlParser

from .reading import UNSET, environment, load, nearest, read, words


SCRIPT = "the script"  # stands for it until it is launched


def fail(prog: str, *mistakes: Any, code: int = 2) -> NoReturn:
    """Say in one line each what the user got wrong, and exit."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)  # rank 0 says it, and its end ends this process; what only this rank knows is said here
    for mistake in mistakes:
        said = re.sub(r"\bhf_[A-Za-z0-9]{16,}", "***", " ".join(str(mistake).split()))  # a token of the Hub
        print(f"{prog}: {said}", file=sys.stderr)
    raise SystemExit(code)


@dataclass(frozen=True)
class Parsed:
    """A command line and its YAML file, understood."""

    values: tuple[Any, ...]  # one instance of each dataclass
    options: argparse.Namespace  # of options that are part of no dataclass
    sources: dict[str, str]  # where an option's value came from; the others have their defaults
    own: list[str]  # the command line without accelerate's words
    launch: list[str]  # accelerate's words, of the file and then of the command line


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Each option once: the spelling with dashes is left out where there is one with underscores."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = spellings(action)
        return super()._format_action_invocation(shown)


def spellings(action: argparse.Action) -> list[str]:
    """The option's names, the first one of those that differ in `-` and `_` only."""
    return [*reversed({word.replace("-", "_"): word for word in reversed(action.option_strings)}.values())]


class StrictParser(TrlParser):
    """`TrlParser` for `dataclass_types`; words it does not have must be `launcher`'s.

    Every mistake is one line on stderr, those of a file together, and exit code 2.
    """

    def __init__(self, dataclass_types, launcher: argparse.ArgumentParser | None = None, **kwargs):
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=Help, **kwargs)
        self.launcher = launcher
        known = launcher._option_string_actions if launcher else {}
        self.accelerate = {word: action for word, action in known.items() if action.dest != "help"}
        self.hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        self.add_argument("--config", metavar="FILE", help="YAML file of settings; the command line overrides it.")

    def error(self, message: str) -> NoReturn:
        fail(self.prog, message)

    def show_last(self, title: str, names: set[str]) -> None:
        """Give some options a part of their own at the end of the help."""
        theirs = self.add_argument_group(title)._group_actions
        theirs += [action for action in self._actions if action.dest in names]
        self._optionals._group_actions = [action for action in self._actions if action not in theirs]

    def parse_args_and_config(self, args: Iterable[str] | None = None, **_: Any) -> tuple[Any, ...]:
        """One instance of each dataclass, from the command line, then `--config`, then the defaults."""
        return self.parse(args).values

    def parse(self, args: Iterable[str] | None = None) -> Parsed:
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
        except ValueError as mistake:  # of a dataclass's __post_init__
            self.error(str(mistake))
        return Parsed(tuple(values), rest, sources, _without(args, left), [*launch, *left])

    # The command line

    def _check_words(self, launch: list[str], left: list[str]) -> None:
        """`left` must be accelerate's."""
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

    # The file

    def read_settings(self, file: str) -> tuple[dict[str, str], list[str]]:
        """Make the file's values the defaults. Returns where those came from, and accelerate's words."""
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
        """Make values the defaults. Returns their names, accelerate's words, and what is wrong with the rest.

        others: keys that are known elsewhere, and could have been meant
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
                    launch += words(name, self.accelerate[f"--{name}"], node)
                else:
                    mistakes.append(f"unknown key {key!r}{nearest(key, known)}")
            except ValueError as mistake:
                mistakes.append(f"{key} {mistake}")
        return names, launch, mistakes


def _without(all_words: list[str], removed: list[str]) -> list[str]:
    """`all_words` without `removed`, which is a part of them in the same order."""
    rest = iter(removed)
    gone, kept = next(rest, None), []
    for word in all_words:
        if word == gone:
            gone = next(rest, None)
        else:
            kept.append(word)
    return kept
