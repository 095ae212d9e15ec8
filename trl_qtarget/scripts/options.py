"""TRL's parser for our own commands, made strict: a word nobody knows ends the run before it costs anything.

TRL's parser hands what it does not know to accelerate, ignores some of it, and takes YAML values unchecked. Commands
that start no training have nobody to hand it to.
"""

import argparse
import difflib
import sys
from collections.abc import Iterable
from typing import Any

import yaml
from trl.scripts.utils import TrlParser


class StrictParser(TrlParser):
    """`TrlParser` whose mistakes are one sentence on stderr and exit code 2, in YAML as on the command line."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.add_argument("--config", metavar="FILE.yaml", help="settings by name; the command line overrides them")

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_args_and_config(  # type: ignore[override]  # no remaining strings: there are none
        self, args: Iterable[str] | None = None
    ) -> tuple[Any, ...]:
        """The dataclasses, filled from the command line, then from `--config`, then from their defaults."""
        args = list(sys.argv[1:] if args is None else args)
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config")
        config = finder.parse_known_args(args)[0].config
        if config is not None:
            self._set_defaults_from(config)
        try:
            *outputs, _, unknown = self.parse_args_into_dataclasses(
                args, return_remaining_strings=True, look_for_args_file=False
            )
        except ValueError as mistake:  # of a dataclass's own __post_init__
            self.error(str(mistake))
        if unknown:
            self.error(self._unknown_option(unknown))
        return tuple(outputs)

    def _set_defaults_from(self, config: str) -> None:
        by_word = {word.lstrip("-"): action for action in self._actions for word in action.option_strings}
        for reserved in ("help", "h", "config"):
            by_word.pop(reserved, None)
        for key, value in self._read(config).items():
            if key not in by_word:
                self.error(f"{config} sets {key!r}, which is no option of this command.{nearest(str(key), by_word)}")
            action = by_word[key]
            # defaults that are strings are converted again by argparse, which is harmless
            self.set_defaults(**{action.dest: self._converted(action, value, f"{config} sets {key}")})
            action.required = False

    def _read(self, config: str) -> dict:
        try:
            with open(config, encoding="utf-8") as file:
                settings = yaml.safe_load(file)
        except OSError as error:
            self.error(f"cannot read --config {config}: {error.strerror or error}")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"{config} is not YAML: {' '.join(str(error).split())}")
        if not isinstance(settings, dict):
            self.error(f"{config} must hold settings by name (`key: value`), not {type(settings).__name__}.")
        return settings

    def _converted(self, action: argparse.Action, value: Any, where: str) -> Any:
        """A YAML value as the command line would have made it, checked by the option's own type and choices."""
        if value is None and not action.required and action.default is None:
            return None
        if action.nargs == "+":
            return [self._scalar(action, item, where) for item in (value if isinstance(value, list) else [value])]
        return self._scalar(action, value, where)

    def _scalar(self, action: argparse.Action, value: Any, where: str) -> Any:
        kind = getattr(action.type, "__name__", "str")
        try:
            if value is None or isinstance(value, list | dict) or (isinstance(value, bool) and "bool" not in kind):
                raise ValueError
            made = action.type(str(value)) if callable(action.type) else str(value)
            if action.choices is not None and made not in action.choices:
                kind = "one of " + ", ".join(map(str, action.choices))
                raise ValueError
        except (ValueError, argparse.ArgumentTypeError):
            wanted = {"string_to_bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}
            self.error(f"{where} to {value!r}; it takes {wanted.get(kind, kind)}.")
        return made

    def _unknown_option(self, unknown: list[str]) -> str:
        options = [word for action in self._actions for word in action.option_strings]
        word = next((word for word in unknown if word.startswith("-")), None)
        if word is None:
            return f"unknown argument {unknown[0]!r}: every setting is given by name, see --help."
        word = word.partition("=")[0]
        return f"unknown option {word!r}.{nearest(word, options)}"


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing."""
    guess = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {guess[0]!r}?" if guess else ""
