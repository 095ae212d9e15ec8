"""What is wrong with the stages of a chain, all of it at once and before the first one starts.

Every stage's settings go through its command's own parser, made strict. What an earlier stage will have made by then
is stood in for by a name that looks like the Hub's.
"""

import argparse
import contextlib
import copy
import importlib
import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from trl import DatasetMixtureConfig

from ..evaluation import preferences
from ..options import preflight
from ..options.launching import make_launcher
from ..options.parsing import StrictParser
from . import inputs
from .plan import OWN, POLICIES, REFERENCED, Stage, plain


OURS = ("sft", "cache", "plan", "eval", "merge")


@dataclass(frozen=True)
class Ready:
    """A stage as it will run: the contents of its YAML file, and words that do not go into it.

    `unchecked`: why nothing tells at the first step whether the model is its own reference, if that is so.
    """

    settings: dict[str, Any]
    words: list[str]
    unchecked: str = ""


def parser(command: str, prog: str) -> StrictParser:
    """A command's own parser; TRL's made strict."""
    if command in OURS:
        return importlib.import_module(f"trl_qtarget.scripts.{command}").make_parser(prog=prog)
    kinds = importlib.import_module(f"trl.scripts.{command}").make_parser().dataclass_types
    return StrictParser(kinds, launcher=make_launcher(), prog=prog)


def options(command: str) -> list[str]:
    """The names of a command's settings, accelerate's among them where it is launched by that."""
    made = parser(command, command)
    own = [action.dest for action in made._actions if action.dest in made.hints]
    return sorted({*own, "env", *(word[2:].replace("-", "_") for word in made.accelerate if word.startswith("--"))})


def validate(stages: list[Stage], done: set[str]) -> tuple[dict[str, Ready], list[str]]:
    """The stages that are not `done`, ready to run, and everything that is wrong with them."""
    ready, found = {}, []
    planned = {str(stage.output): f"planned/{stage.name}" for stage in stages if stage.name not in done}
    for stage in stages:
        if stage.name not in done:
            ready[stage.name], wrong = _stage(stage, planned, stages)
            found += [f"stage {stage.name}: {' '.join(line.split())}" for line in dict.fromkeys(wrong)]
    return ready, found


def _stage(stage: Stage, planned: dict[str, str], stages: list[Stage]) -> tuple[Ready, list[str]]:
    made = parser(stage.command, stage.command)
    nodes = yaml.compose(_text(stage, planned), yaml.SafeLoader).value
    with _own_environment():
        names, launch, found = made.take([(name.value, node) for name, node in nodes], OWN)
        # before dataclasses work on the very objects
        settings = {name: copy.deepcopy(made.get_default(name)) for name in names}
        given = {action.dest: copy.deepcopy(made.get_default(action.dest)) for action in made._actions}
        values, wrong = _values(made, launch)
        found += [*wrong, *_no_adapter(stage, stages), *_wrong(stage.command, given, _data(stages, planned))]
        if not found:
            found = _missing(stage.command, values)
    environment = plain(stage.settings.get("env"))
    flags = [word for word in launch if "=" not in word]
    settings |= dict(word[2:].split("=", 1) for word in launch if "=" in word)
    settings |= {"env": environment} if environment else {}
    back = {stand_in: path for path, stand_in in planned.items()}
    return Ready(_replaced(settings, back), flags, _unchecked(stage, given)), [_replaced(line, back) for line in found]


def _unchecked(stage: Stage, given: dict[str, Any]) -> str:
    """Why the first step is not checked."""
    if stage.command not in REFERENCED:
        return ""
    if given["beta"] == 0:
        return "with beta 0 nothing of a reference is logged"
    if stage.tolerance is None:
        first = plain(stage.settings["logging_first_step"])
        return "logging_first_step is false" if first is not True else "step0_tolerance is null"
    return ""


def _text(stage: Stage, planned: dict[str, str]) -> str:
    """A stage's YAML: the nodes as they were written, so that `no` stays a word."""
    pairs = [(yaml.ScalarNode("tag:yaml.org,2002:str", key), node) for key, node in stage.settings.items()]
    return _replaced(yaml.serialize(yaml.MappingNode("tag:yaml.org,2002:map", pairs)), planned)


def _replaced(value: Any, names: dict[str, str]) -> Any:
    """`value` with some paths in its texts replaced."""
    if isinstance(value, dict):
        return {key: _replaced(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, names) for inner in value]
    if isinstance(value, str):
        for old in sorted(names, key=len, reverse=True):
            value = value.replace(old, names[old])
    return value


def _values(made: StrictParser, launch: list[str]) -> tuple[tuple[Any, ...], list[str]]:
    """What the settings that a parser has taken come to, and why that is nothing."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the command itself will say them
            return made.parse(launch).values, []
    except SystemExit:
        return (), [line.removeprefix(f"{made.prog}: ") for line in said.getvalue().splitlines()]
    except Exception as mistake:  # whatever a dataclass of another package says of its values
        return (), [str(mistake)]


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """Undo what `env` of a stage and the making of training arguments set."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


# What a command would find out late


def _no_adapter(stage: Stage, stages: list[Stage]) -> list[str]:
    """The training commands of TRL load no folder that holds an adapter alone."""
    if stage.command in ("eval", "merge"):
        return []
    given = plain(stage.settings.get("model_name_or_path"))
    adapters = {str(s.output) for s in stages if s.command in POLICIES and plain(s.settings.get("use_peft")) is True}
    local = isinstance(given, str) and Path(given, "adapter_config.json").is_file()
    alone = given in adapters or (local and not Path(given, "config.json").is_file())
    if not alone:
        return []
    return [f"{stage.command} cannot start from an adapter alone, as TRL loads none: use handoff: merge before it"]


def _data(stages: list[Stage], planned: dict[str, str]) -> inputs.Planned:
    """The files of data that stages to come will write, by their stand-ins."""
    pairs = {preferences.FILE: preferences.COLUMNS}
    return {
        planned[str(stage.output)]: pairs if stage.command == "eval" and plain(stage.settings.get("pairs")) else {}
        for stage in stages
        if str(stage.output) in planned
    }


def _wrong(command: str, given: dict[str, Any], planned: inputs.Planned) -> list[str]:
    """Folders, data and functions that are named, and are not there."""
    found = []
    if command != "eval":
        found += preflight.no_model("model_name_or_path", given["model_name_or_path"])
    if command == "merge":
        return found
    if command == "eval":
        if given["dataset"] and given["model_name_or_path"]:
            found += inputs.wrong_data(command, given, planned) + inputs.wrong_evaluation(argparse.Namespace(**given))
        return found
    if command in ("sft", "cache"):
        found += preflight.no_model("teacher_model_name_or_path", given["teacher_model_name_or_path"])
    if command == "sft" and given["teacher_cache"] is not None:
        found += preflight.no_cache(given["teacher_cache"])
    given["datasets"] = DatasetMixtureConfig(given["datasets"]).datasets
    found += inputs.wrong_data(command, given, planned)
    return found + (inputs.wrong_rewards(given) if given.get("reward_funcs") else [])


def _missing(command: str, values: tuple[Any, ...]) -> list[str]:
    """What is not given, if nothing that is given is wrong: else it may be what was meant."""
    if command in ("eval", "merge"):
        return []
    if command in OURS:
        return importlib.import_module(f"trl_qtarget.scripts.{command}").mistakes(*values)
    named = {f.name: getattr(value, f.name) for value in values for f in fields(value)}
    found = [] if named["model_name_or_path"] else ["no model: set model_name_or_path"]
    found += preflight.no_data(values[0], values[-1])
    return found + (inputs.wrong_rewards(named) if command in ("grpo", "rloo") else [])
