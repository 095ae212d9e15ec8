"""The script behind `trl-qtarget completion`: it completes commands, their options, and the names of losses.

It is made once, from the commands' own parsers. After that the shell alone reads it, so that a Tab starts no Python.
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
    """For one of `shtab.SUPPORTED_SHELLS`.

    root: has all commands, which get their options here
    light: the parsers of commands that load nothing
    """
    (commands,) = (action.choices for action in root._actions if isinstance(action, argparse._SubParsersAction))
    for name, command in commands.items():
        for action in light[name]._actions if name in light else _options(name):
            # accelerate's where the command has none of that name
            words = [word for word in spellings(action) if word not in command._option_string_actions]
            if words or not action.option_strings:
                action.option_strings = words
                command._add_action(_described(action))
    return shtab.complete(root, shell)


def _options(command: str) -> Iterator[argparse.Action]:
    """Those of a command that loads TRL, accelerate's among them where it is launched by that."""
    try:
        own = parser(command, command)
    except (ImportError, AttributeError):  # of TRL, and no script that has options
        return
    yield from own._actions
    yield from own.accelerate.values()


def _described(action: Any) -> argparse.Action:
    """With what may follow it."""
    names = {"loss": [*PRESETS], "name": [*PRESETS], "verifier": ["exact", "math"]}  # name: of `losses`
    action.choices = names.get(action.dest, action.choices)
    if "--accelerate_config" in action.option_strings:
        action.choices = accelerate_configs()
    elif action.dest in FILES:
        action.complete = shtab.FILE
    elif action.dest in FOLDERS:
        action.complete = shtab.DIRECTORY
    return action
