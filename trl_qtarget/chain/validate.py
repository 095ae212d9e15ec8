"""Finds the mistakes in all stages of a chain before the first one starts.

The settings of every stage go through its command's own parser, made strict. For each output of an earlier stage that
does not exist yet, the parser gets a stand-in: a made-up name of the Hub, which no check looks for on the disk.
"""

import argparse
import contextlib
import copy
import importlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from trl import DatasetMixtureConfig

from .. import compat
from ..evaluation import preferences
from ..options import preflight
from ..options.launching import make_launcher
from ..options.parsing import StrictParser
from . import inputs
from .chain_file import STAGE_KEYS
from .commands import OUTPUT, PLUGIN, STEP0_CHECKED
from .nodes import Reference, changed, plain, scalar
from .plan import Stage


@dataclass(frozen=True)
class Ready:
    """A stage that can be run: the contents of its YAML file, and words of the command line that no file can hold.

    `unchecked` is the reason why its first step does not show whether the model equals its reference, "" if it does.
    """

    settings: dict[str, Any]
    words: list[str]
    unchecked: str = ""


def parser(command: str, prog: str) -> StrictParser:
    """Return a strict parser of a command of this package or of TRL."""
    if command in PLUGIN:
        return importlib.import_module(f"trl_qtarget.scripts.{command}").make_parser(prog=prog)
    kinds = compat.script_arguments(command)
    return StrictParser(kinds, launcher=make_launcher(), prog=prog)


def options(command: str) -> list[str]:
    """Return the names of a command's settings, with those of accelerate if accelerate launches the command."""
    of_command = parser(command, command)
    own = [action.dest for action in of_command.actions if action.dest in of_command.hints]
    launch = [word[2:].replace("-", "_") for word in of_command.accelerate if word.startswith("--")]
    return sorted({*own, "env", *launch})


def validate(stages: list[Stage], done: set[str]) -> tuple[dict[str, Ready], list[str]]:
    """Return the stages that are not `done`, ready to run, and all mistakes in them."""
    ready, mistakes = {}, []
    for stage in stages:
        if stage.name not in done:
            ready[stage.name], wrong = _stage(stage, stages, done)
            mistakes += [f"stage {stage.name}: {' '.join(line.split())}" for line in dict.fromkeys(wrong)]
    return ready, mistakes


def _stage(stage: Stage, stages: list[Stage], done: set[str]) -> tuple[Ready, list[str]]:
    of_command = parser(stage.command, stage.command)
    stand_ins = StandIns(stages, done)
    with _restored_environment():
        names, launch, _ = of_command.take(stage.settings.items())
        settings = {name: copy.deepcopy(of_command.get_default(name)) for name in names}
        nodes = {key: changed(node, stand_ins.replace) for key, node in stage.settings.items()}
        _, checked_launch, mistakes = of_command.take(nodes.items(), STAGE_KEYS)
        # a copy, because dataclasses change the very objects that they are given
        given = {action.dest: copy.deepcopy(of_command.get_default(action.dest)) for action in of_command.actions}
        values, wrong = _values(of_command, checked_launch)
        mistakes += [*wrong, *_adapter_alone(stage, stages), *_wrong(stage.command, given, stand_ins.data())]
        if values and not any(line.startswith("unknown key") for line in mistakes):  # which may be the missing one
            mistakes += _missing(stage.command, values)
    environment = plain(stage.settings.get("env"))
    flags = [word for word in launch if "=" not in word]
    settings |= dict(word[2:].split("=", 1) for word in launch if "=" in word)
    settings |= {"env": environment} if environment else {}
    return Ready(settings, flags, _unchecked(stage, given)), [stand_ins.shown(line) for line in mistakes]


class StandIns:
    """Made-up names of the Hub for the outputs of stages that are not `done`, which no check looks for on the disk."""

    def __init__(self, stages: list[Stage], done: set[str]):
        self.stages = {stage.name: stage for stage in stages}
        self.done = done
        self.references: dict[str, Reference] = {}  # by their stand-in

    def replace(self, node: yaml.ScalarNode) -> yaml.ScalarNode:
        """Return the stand-in for a reference to an output that will be written, and any other node as it is."""
        if not isinstance(node, Reference) or node.stages <= self.done:
            return node
        name = node.value
        if self._will_exist(node):
            name = f"stand-in/{len(self.references)}{Path(node.value).suffix}"  # the suffix tells the format of data
        self.references[name] = node
        return scalar(name)

    def _will_exist(self, reference: Reference) -> bool:
        """Whether a model's path is one that its stage will write: the output itself, or a checkpoint of training."""
        if reference.path is None:
            return True
        name, inside = reference.path
        if name not in self.stages:  # its command cannot be told
            return True
        command = self.stages[name].command
        checkpoint = command != "merge" and inside.startswith("checkpoint-")
        return not inside or checkpoint or OUTPUT[command] != "model"

    def data(self) -> inputs.Planned:
        """Return the files of data that stages will write, for each stand-in."""
        planned = {}
        for name, reference in self.references.items():
            source, inside = reference.path or (None, "")
            stage = self.stages.get(source) if source else None
            pairs = stage is not None and stage.command == "eval" and plain(stage.settings.get("pairs"))
            planned[name] = inside, {preferences.FILE: preferences.COLUMNS} if pairs else {}
        return planned

    def shown(self, message: str) -> str:
        """Return a message with the real paths in place of stand-ins."""
        for name, reference in reversed(self.references.items()):  # stand-in/12 before stand-in/1
            message = message.replace(name, reference.value)
        return message


def _unchecked(stage: Stage, given: Mapping[str, Any]) -> str:
    """Return the reason why a stage's first step is not checked, "" if it is or if its command has no such check."""
    if stage.command not in STEP0_CHECKED:
        return ""
    if given["beta"] == 0:
        return "with beta 0 nothing of a reference is logged"
    if stage.tolerance is None:
        first = plain(stage.settings["logging_first_step"])
        return "logging_first_step is false" if first is not True else "step0_tolerance is null"
    return ""


def _values(of_command: StrictParser, launch: list[str]) -> tuple[tuple[Any, ...], list[str]]:
    """Return the dataclasses that a parser makes of the settings it has taken, or the mistakes that prevent them."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the command itself will show them
            return of_command.parse(launch).values, []
    except SystemExit:
        return (), [line.removeprefix(f"{of_command.prog}: ") for line in errors.getvalue().splitlines()]
    except Exception as mistake:  # a dataclass of another package may raise anything
        return (), [str(mistake)]


@contextlib.contextmanager
def _restored_environment() -> Iterator[None]:
    """Undo the changes of the environment by a stage's `env` and by the making of training arguments."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


# Mistakes that a command would find out late


def _adapter_alone(stage: Stage, stages: list[Stage]) -> list[str]:
    """Refuse a training that starts from a folder with an adapter alone, which TRL's training commands do not load."""
    node = stage.settings.get("model_name_or_path")
    if stage.command in ("eval", "merge") or node is None:
        return []
    adapters = {stage.name for stage in stages if stage.makes_adapter}
    alone = isinstance(node, Reference) and node.path is not None and node.path[0] in adapters
    folder = plain(node)
    if isinstance(folder, str) and Path(folder, "adapter_config.json").is_file():
        alone = alone or not Path(folder, "config.json").is_file()
    if not alone:
        return []
    return [f"{stage.command} cannot start from an adapter alone, as TRL loads none: use handoff: merge before it"]


def _wrong(command: str, given: dict[str, Any], planned: inputs.Planned) -> list[str]:
    """Return a mistake for each folder, data set and function that a setting names and that does not exist."""
    mistakes = []
    if command != "eval":
        mistakes += preflight.no_model("model_name_or_path", given["model_name_or_path"])
    if command == "merge":
        return mistakes
    if command == "eval":
        if given["dataset"] and given["model_name_or_path"]:
            mistakes += inputs.wrong_data(command, given, planned)
            mistakes += inputs.wrong_evaluation(argparse.Namespace(**given))
        return mistakes
    if command in ("sft", "cache"):
        mistakes += preflight.no_model("teacher_model_name_or_path", given["teacher_model_name_or_path"])
    if command == "sft" and given["teacher_cache"] is not None:
        mistakes += preflight.no_cache(given["teacher_cache"])
    given["datasets"] = DatasetMixtureConfig(given["datasets"]).datasets
    mistakes += inputs.wrong_data(command, given, planned)
    return mistakes + (inputs.wrong_rewards(given) if given.get("reward_funcs") else [])


def _missing(command: str, values: tuple[Any, ...]) -> list[str]:
    """Return a mistake for each setting that the command needs and that is not given."""
    if command in ("eval", "merge"):
        return []
    if command in PLUGIN:
        return importlib.import_module(f"trl_qtarget.scripts.{command}").mistakes(*values)
    named = {f.name: getattr(value, f.name) for value in values for f in fields(value)}
    mistakes = [] if named["model_name_or_path"] else ["no model: set model_name_or_path"]
    mistakes += preflight.no_data(values[0], values[-1])
    return mistakes + (inputs.wrong_rewards(named) if command in ("grpo", "rloo") else [])
