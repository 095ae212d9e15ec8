"""What is wrong with the stages of a chain, all of it at once and before the first one starts.

Every stage's settings go through its command's own parser, made strict. What an earlier stage will have made by then
is stood in for by a name that looks like the Hub's.
"""

import contextlib
import copy
import importlib
import io
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ..evaluation import preferences
from ..scripts import preflight
from ..scripts.launching import make_launcher
from ..scripts.parsing import Parsed, StrictParser
from ..scripts.reading import load
from . import inputs
from .plan import POLICIES, Stage, plain


OURS = ("sft", "cache", "eval", "merge")


@dataclass(frozen=True)
class Ready:
    """A stage as it will run: the contents of its YAML file, and words that do not go into it."""

    settings: dict[str, Any]
    words: list[str]


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
    with tempfile.TemporaryDirectory() as scratch, _own_environment():
        file = Path(scratch, "stage.yaml")
        file.write_text(_text(stage, planned), encoding="utf-8")
        try:
            made, parsed = _parse(stage.command, str(file))
        except ValueError as mistakes:
            return Ready({}, []), [line.replace(f"{file}: ", "") for line in mistakes.args]
        back = {stand_in: path for path, stand_in in planned.items()}
        found = [*_no_adapter(stage, stages), *_checks(stage.command, parsed.values, _data(stages, planned))]
        return Ready(_replaced(made.settings, back), made.words), [_replaced(line, back) for line in found]


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


def _parse(command: str, file: str) -> tuple[Ready, Parsed]:
    """Read a stage's file as its command will.

    Raises:
        ValueError: each mistake an argument.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the command itself will say them
            reader = parser(command, command)
            sources, launch = reader.read_settings(file)
            # before dataclasses work on the very objects
            settings = {name: copy.deepcopy(reader.get_default(name)) for name in sources}
            parsed = reader.parse(["--config", file])
    except SystemExit:
        lines = said.getvalue().splitlines()
        raise ValueError(*(line.removeprefix(f"{command}: ") for line in lines)) from None
    except Exception as mistake:  # whatever a dataclass of another package says of its values
        raise ValueError(str(mistake)) from None
    environment = plain(dict(load(file)).get("env"))
    flags = [word for word in launch if "=" not in word]
    values = dict(word[2:].split("=", 1) for word in launch if "=" in word)
    return Ready(settings | values | ({"env": environment} if environment else {}), flags), parsed


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


def _checks(command: str, values: tuple[Any, ...], planned: inputs.Planned) -> list[str]:
    named = {f.name: getattr(value, f.name) for value in values for f in fields(value)}
    found = inputs.wrong_data(command, named, planned)
    if command == "merge":
        return []
    if command == "eval":
        return found + inputs.wrong_evaluation(values[0])
    if command in OURS:
        return importlib.import_module(f"trl_qtarget.scripts.{command}").mistakes(*values) + found
    if named["model_name_or_path"] is None:
        found.append("no model: set model_name_or_path")
    found += preflight.no_model("model_name_or_path", named["model_name_or_path"])
    found += preflight.no_data(values[0], values[-1])
    return found + (inputs.wrong_rewards(named) if command in ("grpo", "rloo") else [])
