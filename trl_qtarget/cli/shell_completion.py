"""`trl-qtarget completion`: a script for a shell that completes commands, their options and the names of losses.

The script is made once, from the commands' own parsers. The shell then reads it alone, so that Tab starts no Python.
"""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

import shtab

from ..chain.validate import parser
from ..options.launching import accelerate_configs
from ..options.parsing import spellings
from ..theory.presets import PRESETS


FOLDERS = ("output_dir", "teacher_cache", "model_name_or_path", "teacher_model_name_or_path")
FILES = ("config", "dataset", "config_file")


def script(shell: str, root: argparse.ArgumentParser, light: Mapping[str, argparse.ArgumentParser]) -> str:
    """Return the script for one of `shtab.SUPPORTED_SHELLS`.

    Args:
        root: a parser of all commands without their options, which are added to it
        light: the parsers of the commands that load neither torch nor TRL, by name
    """
    (commands,) = (action.choices for action in root._actions if isinstance(action, argparse._SubParsersAction))
    for name, command in commands.items():
        for action in light[name]._actions if name in light else _options(name):
            # an option of accelerate is left out where the command itself has one of its name
            words = [word for word in spellings(action) if word not in command._option_string_actions]
            if words or not action.option_strings:
                action.option_strings = words
                command._add_action(_described(action))
    return shtab.complete(root, shell)


def _options(command: str) -> Iterator[argparse.Action]:
    """Yield the options of a command that loads TRL, and those of accelerate if accelerate launches the command."""
    try:
        of_command = parser(command, command)
    except (ImportError, AttributeError):  # a command of TRL without a script of its own
        return
    yield from of_command._actions
    yield from of_command.accelerate.values()


def _described(action: Any) -> argparse.Action:
    """Return an option with the values that may follow it."""
    names = {"loss": [*PRESETS], "name": [*PRESETS], "verifier": ["exact", "math"]}  # `name` belongs to `losses`
    action.choices = names.get(action.dest, action.choices)
    if "--accelerate_config" in action.option_strings:
        action.choices = accelerate_configs()
    elif action.dest in FILES:
        action.complete = shtab.FILE
    elif action.dest in FOLDERS:
        action.complete = shtab.DIRECTORY
    return action
