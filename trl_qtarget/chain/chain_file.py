"""A chain's YAML file: `output_dir`, `defaults` and `stages`, read without any command's parser."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..options.reading import load, nearest
from .commands import ADAPTING, OUTPUT, SET_BY_CHAIN, STEP0_CHECKED
from .nodes import plain


CHAIN_KEYS = ("output_dir", "defaults", "stages")
STAGE_KEYS = ("name", "command", "handoff", "step0_tolerance")  # of a stage; its other keys are its command's options
HANDOFFS = ("auto", "merge", "adapter")
TOLERANCE = 0.02  # nats, or units of reward: far below the difference to another model, far above rounding
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
TAKEN_FILES = ("options.json", "chain.html")  # a chain writes them beside its stages' folders
MOVED_ASIDE = re.compile(r"\.old-\d+$")  # the ending of a stage's folder that was moved aside


class Mistakes(ValueError):
    """The mistakes in a chain, one sentence per exception argument."""


UNKNOWN = "OUTPUT_DIR"  # stands for the chain's output_dir in other mistakes where the file has none


@dataclass(frozen=True)
class Entry:
    """One entry of `stages`, with the options of its command as they stand in the file.

    Where the command cannot be told, it is None: stages after it are checked as if a policy came from it.
    """

    name: str
    command: str | None
    handoff: str
    tolerance: float | None
    settings: dict[str, yaml.Node]


@dataclass(frozen=True)
class Chain:
    """The contents of a chain's file, and `mistakes` that did not stop it from being read."""

    mistakes: list[str]
    output_dir: Path
    defaults: dict[str, yaml.Node]
    entries: list[Entry]


def read(file: str) -> Chain:
    """Read a chain's YAML file.

    Raises:
        Mistakes: the file cannot be read, or has no stages.
    """
    try:
        top = dict(load(file))
    except ValueError as mistake:
        raise Mistakes(str(mistake)) from None
    mistakes = [f"{file}: unknown key {key!r}{nearest(key, CHAIN_KEYS)}" for key in top if key not in CHAIN_KEYS]
    folder = plain(top.get("output_dir"))
    if not isinstance(folder, str):
        mistakes.append(f"{file}: output_dir must be the folder of the whole chain, got {folder!r}")
        folder = UNKNOWN
    elif Path(folder).exists() and not Path(folder).is_dir():
        mistakes.append(f"{file}: output_dir must be a folder, and {folder} is a file")
    defaults, wrong = _mapping(top.get("defaults"), "defaults")
    mistakes += wrong
    nodes = top["stages"].value if isinstance(top.get("stages"), yaml.SequenceNode) else []
    if not nodes:
        raise Mistakes(*mistakes, f"{file}: stages must be a list of mappings, as in `- command: sft`")
    entries: list[Entry] = []
    for number, node in enumerate(nodes, start=1):
        entry, wrong = _entry(node, number)
        mistakes += wrong
        entries.append(entry)
    entries, taken = _told_apart(entries)
    mistakes += [f"stage {name}: the name is taken, give it another `name`" for name in sorted(taken)]
    mistakes += _secrets("defaults", defaults)
    for entry in entries:
        mistakes += _secrets(f"stage {entry.name}", entry.settings)
    return Chain(mistakes, Path(folder), defaults, entries)


def _entry(node: yaml.Node, number: int) -> tuple[Entry, list[str]]:
    """Return the entry in a node, and the mistakes in it."""
    settings, mistakes = _mapping(node, f"stage {number}")
    own = {key: plain(settings.pop(key)) for key in STAGE_KEYS if key in settings}
    command, name = own.get("command"), own.get("name", own.get("command", number))
    where = f"stage {name}"
    if mistakes or (not settings and not own):
        return _unreadable(name), mistakes or [f"{where}: must be a mapping, as in `command: sft`"]
    if not isinstance(command, str) or command not in OUTPUT:
        guess = nearest(str(command), OUTPUT) if command is not None else ""
        mistakes.append(f"{where}: command must be one of {', '.join(OUTPUT)}, got {command!r}{guess}")
        close = difflib.get_close_matches(str(command), OUTPUT, n=1)
        command = close[0] if close else None  # so that mistakes in its settings are found in the same run
    if not isinstance(name, str) or not NAME.fullmatch(name):
        mistakes.append(f"{where}: name must be of letters, digits, '.', '_' and '-', got {name!r}")
    elif name in TAKEN_FILES or MOVED_ASIDE.search(name):
        mistakes.append(
            f"{where}: name must be another one, {name!r} is a name that the chain itself uses in its folder"
        )
    if command is None:
        return _unreadable(name), mistakes
    handoff, tolerance = own.get("handoff", "auto"), own.get("step0_tolerance", TOLERANCE)
    mistakes += [f"{where}: {mistake}" for mistake in _wrong_keys(command, own, settings)]
    return Entry(str(name), command, handoff if handoff in HANDOFFS else "auto", tolerance, settings), mistakes


def _unreadable(name: Any) -> Entry:
    return Entry(str(name), None, "auto", None, {})


def _told_apart(entries: list[Entry]) -> tuple[list[Entry], set[str]]:
    """Return the entries, with a number behind each name that is taken, and these names.

    The name of a merge is taken too: a chain writes it after the stage `sft` as `sft-merge`.
    """
    names = {entry.name for entry in entries}
    apart: list[Entry] = []
    taken: set[str] = set()
    for number, entry in enumerate(entries, start=1):
        before = {other.name for other in apart}
        if entry.name in before or entry.name.removesuffix("-merge") in names - {entry.name}:
            taken.add(entry.name)
            entry = replace(entry, name=f"{entry.name}#{number}")
        apart.append(entry)
    return apart, taken


def _wrong_keys(command: str, own: dict[str, Any], settings: dict[str, yaml.Node]) -> Iterator[str]:
    """Yield the mistakes in the chain's own keys of a stage, and the options that its command must not be given."""
    if "handoff" in own and own["handoff"] not in HANDOFFS:
        yield f"handoff must be one of {', '.join(HANDOFFS)}, got {own['handoff']!r}"
    tolerance = own.get("step0_tolerance")
    number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if tolerance is not None and not (number and tolerance >= 0):
        yield f"step0_tolerance must be a number of at least 0, or null for no check, got {tolerance!r}"
    if "handoff" in own and command not in ADAPTING:
        yield f"{command} leaves no adapter, so it takes no handoff"
    if "step0_tolerance" in own and command not in STEP0_CHECKED:
        yield f"{command} has no reference, so it takes no step0_tolerance"
    for key, why in SET_BY_CHAIN.items():
        if key in settings:
            yield f"leave out {key}: {why}"
    if command == "cache" and "teacher_cache" in settings:
        yield f"leave out teacher_cache: {SET_BY_CHAIN['output_dir']}"


def _mapping(node: yaml.Node | None, where: str) -> tuple[dict[str, yaml.Node], list[str]]:
    """Return the nodes of a mapping by name, and the mistakes in the mapping."""
    if node is None:
        return {}, []
    if not isinstance(node, yaml.MappingNode):
        return {}, [f"{where}: must be a mapping, got {plain(node)!r}"]
    yaml.SafeLoader("").flatten_mapping(node)
    names = [name.value.replace("-", "_") for name, _ in node.value]
    twice = sorted({name for name in names if names.count(name) > 1})
    settings = dict(zip(names, (value for _, value in node.value), strict=True))
    return settings, [f"{where}: {name} is set twice" for name in twice]


def _secrets(where: str, settings: dict[str, yaml.Node]) -> Iterator[str]:
    """Yield a mistake for each setting that would put a secret into a stage's files."""
    from ..options.print_config import masked

    for key, node in settings.items():
        value = plain(node)
        if masked(key, value) != value:
            yield f"{where}: leave out the secret in {key}, and set it in the environment, as in HF_TOKEN=..."
