"""A chain's stages: what each one is given, where it writes, and which earlier ones it reads.

Settings stay YAML nodes until the stage's own parser reads them: only that knows whether `no` is a word or false.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..options.reading import load, nearest


OUTPUT = {  # a command's output in its stage's folder
    "sft": "model",
    "dpo": "model",
    "kto": "model",
    "grpo": "model",
    "rloo": "model",
    "reward": "model",
    "merge": "model",
    "cache": "cache",
    "eval": "results",
}
POLICIES = ("sft", "dpo", "kto", "grpo", "rloo", "merge")  # their output is what the next stage starts from
REFERENCED = ("dpo", "kto", "grpo", "rloo")  # they compare the model with a reference, at first its own copy
HANDOFFS = ("auto", "merge", "adapter")
TOLERANCE = 0.02  # nats, or units of reward: far below what another model differs by, far above rounding
OWN = {"name": "name", "command": "command", "handoff": "handoff", "step0_tolerance": "step0_tolerance"}
CHAINS = {  # options of the commands that the chain sets
    "output_dir": "every stage writes into the chain's output_dir",
    "resume_from_checkpoint": "a chain resumes by itself",
    "overwrite_output_dir": "a chain overwrites nothing",
    "overwrite": "a chain overwrites nothing",
}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
FILES = ("options.json", "chain.html")  # what a chain writes beside its stages' folders
ASIDE = re.compile(r"\.old-\d+$")  # and where it moves these
REFERENCE = re.compile(r"\$\{([^}]*)\}")


class Mistakes(ValueError):
    """What is wrong with a chain, a sentence each."""


@dataclass(frozen=True)
class Draft:
    """A stage as it stands in the file."""

    name: str
    command: str
    handoff: str
    tolerance: float | None
    settings: dict[str, yaml.Node]


@dataclass(frozen=True)
class Chain:
    """The file, read, and the `mistakes` in it that leave it readable."""

    mistakes: list[str]
    output_dir: Path
    defaults: dict[str, yaml.Node]
    drafts: list[Draft]


@dataclass(frozen=True)
class Stage:
    """A stage with everything it is given. `tolerance`: of its step-0 check, None for none."""

    name: str
    command: str
    folder: Path
    settings: dict[str, yaml.Node]
    tolerance: float | None = None

    @property
    def output(self) -> Path:
        return self.folder / OUTPUT[self.command]

    @property
    def config(self) -> Path:
        return self.folder / "stage.yaml"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def by_hand(self) -> list[str]:
        return ["trl-qtarget", self.command, "--config", str(self.config)]


# Reading the file


def read(file: str) -> Chain:
    """The chain of a YAML file.

    Raises:
        Mistakes: why there is none.
    """
    try:
        top = dict(load(file))
    except ValueError as mistake:
        raise Mistakes(str(mistake)) from None
    known = ("output_dir", "defaults", "stages")
    found = [f"{file}: unknown key {key!r}{nearest(key, known)}" for key in top if key not in known]
    folder = plain(top["output_dir"]) if "output_dir" in top else None
    if not isinstance(folder, str):
        found.append(f"{file}: output_dir must be the folder of the whole chain, got {folder!r}")
    defaults, twice = _mapping(top.get("defaults"), "defaults")
    found += twice
    entries = top["stages"].value if isinstance(top.get("stages"), yaml.SequenceNode) else []
    if not entries:
        found.append(f"{file}: stages must be a list of mappings, as in `- command: sft`")
    drafts: list[Draft] = []
    for number, entry in enumerate(entries, start=1):
        draft, wrong = _draft(entry, number)
        found += wrong
        if draft is not None:
            drafts.append(draft)
    names = [draft.name for draft in drafts]
    taken = {name for name in names if names.count(name) > 1 or name.removesuffix("-merge") in {*names} - {name}}
    found += [f"stage {name}: the name is taken, give it another `name`" for name in sorted(taken)]
    found += [f"{where}: {why}" for where, why in _secrets(defaults, drafts)]
    if len(drafts) < len(entries) or not entries or taken or not isinstance(folder, str):
        raise Mistakes(*found)
    return Chain(found, Path(folder), defaults, drafts)


def _draft(entry: yaml.Node, number: int) -> tuple[Draft | None, list[str]]:
    settings, found = _mapping(entry, f"stage {number}")
    own = {key: plain(settings.pop(key)) for key in OWN if key in settings}
    command, label = own.get("command"), own.get("name", own.get("command", number))
    where = f"stage {label}"
    if found or (not settings and not own):
        return None, found or [f"{where}: must be a mapping, as in `command: sft`"]
    if command not in OUTPUT:
        guess = nearest(str(command), OUTPUT) if command is not None else ""
        found.append(f"{where}: command must be one of {', '.join(OUTPUT)}, got {command!r}{guess}")
        close = difflib.get_close_matches(str(command), OUTPUT, n=1)
        if not close:
            return None, found
        command = close[0]  # so that mistakes in its settings are found too
    if not isinstance(label, str) or not NAME.fullmatch(label):
        return None, [*found, f"{where}: name must be of letters, digits, '.', '_' and '-', got {label!r}"]
    if label in FILES or ASIDE.search(label):
        return None, [*found, f"{where}: name must be another one, {label!r} is the chain's own in its folder"]
    handoff, tolerance = own.get("handoff", "auto"), own.get("step0_tolerance", TOLERANCE)
    if handoff not in HANDOFFS:
        found.append(f"{where}: handoff must be one of {', '.join(HANDOFFS)}, got {handoff!r}")
        handoff = "auto"
    if tolerance is not None and (
        isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or tolerance < 0
    ):
        found.append(
            f"{where}: step0_tolerance must be a number of at least 0, or null for no check, got {tolerance!r}"
        )
    for key in ("handoff",) if command not in POLICIES[:-1] else ():
        if key in own:
            found.append(f"{where}: {command} leaves no adapter, so it takes no {key}")
    if "step0_tolerance" in own and command not in REFERENCED:
        found.append(f"{where}: {command} has no reference, so it takes no step0_tolerance")
    found += [f"{where}: leave out {key}: {why}" for key, why in CHAINS.items() if key in settings]
    if command == "cache" and "teacher_cache" in settings:
        found.append(f"{where}: leave out teacher_cache: {CHAINS['output_dir']}")
    return Draft(label, command, handoff, tolerance, settings), found


def _mapping(node: yaml.Node | None, where: str) -> tuple[dict[str, yaml.Node], list[str]]:
    """A mapping's nodes by name, and what is wrong with it."""
    if node is None:
        return {}, []
    if not isinstance(node, yaml.MappingNode):
        return {}, [f"{where}: must be a mapping, got {plain(node)!r}"]
    yaml.SafeLoader("").flatten_mapping(node)
    names = [name.value.replace("-", "_") for name, _ in node.value]
    twice = sorted({name for name in names if names.count(name) > 1})
    return dict(zip(names, (value for _, value in node.value), strict=True)), [
        f"{where}: {name} is set twice" for name in twice
    ]


def _secrets(defaults: dict[str, yaml.Node], drafts: list[Draft]) -> Iterator[tuple[str, str]]:
    """Settings that would put a secret into the files of stages."""
    from ..options.print_config import masked

    places = {"defaults": defaults} | {f"stage {draft.name}": draft.settings for draft in drafts}
    for where, settings in places.items():
        for key, node in settings.items():
            value = plain(node)
            if masked(key, value) != value:
                yield where, f"leave out the secret in {key}, and set it in the environment, as in HF_TOKEN=..."


# Resolving it


def resolve(chain: Chain, options: Mapping[str, Iterable[str]]) -> list[Stage]:
    """Its stages, merges among them. `options`: the names that each command knows, for `defaults`.

    Mistakes are added to the chain's.
    """
    everything = set().union(*options.values())
    found = chain.mistakes
    found += [
        f"defaults: no stage knows {key!r}{nearest(key, everything)}"
        for key in chain.defaults
        if key not in everything
    ]
    found += [f"defaults: leave out {key}: {why}" for key, why in CHAINS.items() if key in chain.defaults]
    stages: list[Stage] = []
    handed: dict[str, str] = {}
    policy: str | None = None
    for draft in chain.drafts:
        known = set(options[draft.command])
        given = {key: node for key, node in chain.defaults.items() if key in known} | draft.settings
        settings = {}
        for key, node in given.items():
            try:
                settings[key] = _filled(node, handed)
            except ValueError as mistake:
                found.append(f"stage {draft.name}: {key} {mistake}")
                settings[key] = scalar("planned/unknown")  # so that it is not missing as well
        if policy is not None:
            settings.setdefault("model_name_or_path", scalar(policy))
        stage = _stage(draft, settings, chain.output_dir)
        stages.append(stage)
        adapter = draft.command in POLICIES and plain(settings.get("use_peft")) is True
        if draft.handoff != "auto" and not adapter:
            found.append(f"stage {draft.name}: handoff is for adapters: set use_peft: true, or leave it out")
        if adapter and (draft.handoff == "merge" or (draft.handoff == "auto" and draft is not chain.drafts[-1])):
            stages.append(_merge(stage, chain.output_dir))
        handed[draft.name] = str(stages[-1].output)
        policy = handed[draft.name] if draft.command in POLICIES else policy
    return stages


def _stage(draft: Draft, settings: dict[str, yaml.Node], root: Path) -> Stage:
    stage = Stage(draft.name, draft.command, root / draft.name, settings)
    settings["teacher_cache" if draft.command == "cache" else "output_dir"] = scalar(str(stage.output))
    if draft.command not in REFERENCED:
        return stage
    settings.setdefault("logging_first_step", scalar("true", "bool"))
    first = plain(settings["logging_first_step"]) is True or plain(settings.get("logging_steps")) == 1
    return Stage(stage.name, stage.command, stage.folder, settings, draft.tolerance if first else None)


def _merge(stage: Stage, root: Path) -> Stage:
    name = f"{stage.name}-merge"
    kept = ("dtype", "model_revision", "trust_remote_code")
    settings = {key: stage.settings[key] for key in kept if key in stage.settings}
    settings["model_name_or_path"] = scalar(str(stage.output))
    settings["output_dir"] = scalar(str(root / name / OUTPUT["merge"]))
    return Stage(name, "merge", root / name, settings)


def _filled(node: yaml.Node, handed: dict[str, str]) -> yaml.Node:
    """`node` with its `${stages.NAME.output_dir}` replaced."""

    def value(match: re.Match) -> str:
        parts = match[1].split(".")
        name = ".".join(parts[1:-1])
        if parts[0] != "stages" or parts[-1] != "output_dir" or not name:
            raise ValueError(f"has {match[0]!r}: the only reference is ${{stages.NAME.output_dir}}")
        if name not in handed:
            raise ValueError(f"refers to stage {name!r}, and there is no such stage before it{nearest(name, handed)}")
        return handed[name]

    if isinstance(node, yaml.ScalarNode):
        return scalar(REFERENCE.sub(value, node.value)) if REFERENCE.search(node.value) else node
    if isinstance(node, yaml.SequenceNode):
        return yaml.SequenceNode(node.tag, [_filled(item, handed) for item in node.value])
    return yaml.MappingNode(node.tag, [(key, _filled(item, handed)) for key, item in node.value])


# Nodes


def plain(node: yaml.Node | None) -> Any:
    """What YAML makes of a node."""
    return None if node is None else yaml.SafeLoader("").construct_document(node)


def scalar(text: str, kind: str = "str") -> yaml.ScalarNode:
    return yaml.ScalarNode(f"tag:yaml.org,2002:{kind}", text)
