"""The stages of a chain: the settings of each, the folder it writes into, and the earlier stages that it reads."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from ..options.reading import nearest
from .chain_file import Chain, Entry
from .commands import ADAPTING, OUTPUT, POLICIES, SET_BY_CHAIN, STEP0_CHECKED
from .nodes import Output, Reference, plain, references, scalar, with_references


@dataclass(frozen=True)
class Stage:
    """One stage of a chain, with all its settings. `tolerance` is the limit of its step-0 check, None for no check."""

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
    def command_line(self) -> list[str]:
        """The words that run the stage by hand."""
        return ["trl-qtarget", self.command, "--config", str(self.config)]

    @property
    def reads(self) -> set[str]:
        """The names of the earlier stages whose outputs the settings refer to."""
        found = {
            name for node in self.settings.values() for reference in references(node) for name in reference.stages
        }
        return found - {self.name}

    @property
    def makes_adapter(self) -> bool:
        """Whether its output is an adapter that needs a base model."""
        return self.command in ADAPTING and plain(self.settings.get("use_peft")) is True


def resolve(chain: Chain, options: Mapping[str, Iterable[str]]) -> list[Stage]:
    """Return the stages of a chain, with a merge after each adapter that the next stage cannot start from.

    Mistakes in defaults, references and handoffs are added to the chain's mistakes.

    Args:
        options: the names of each command's options; a default is given to the stages whose command has its name
    """
    everything = set().union(*options.values())
    mistakes = chain.mistakes
    mistakes += [
        f"defaults: no stage knows {key!r}{nearest(key, everything)}"
        for key in chain.defaults
        if key not in everything
    ]
    mistakes += [f"defaults: leave out {key}: {why}" for key, why in SET_BY_CHAIN.items() if key in chain.defaults]
    stages: list[Stage] = []
    handed_on: dict[str, Output] = {}  # by the name of an entry: the output of its stage, or of the merge after it
    policy: Output | None = None  # the model that the next stage starts from
    for entry in chain.entries:
        if entry.command is None:
            handed_on[entry.name] = policy = Output(entry.name, str(chain.output_dir / entry.name / "model"))
            continue
        known = set(options[entry.command])
        settings = {key: node for key, node in chain.defaults.items() if key in known} | entry.settings
        settings = _with_references(entry.name, settings, handed_on, stages, mistakes)
        if policy is not None:
            settings.setdefault("model_name_or_path", Reference(policy))
        stage = _stage(entry, entry.command, settings, chain.output_dir)
        stages.append(stage)
        if entry.handoff != "auto" and not stage.makes_adapter:
            mistakes.append(f"stage {entry.name}: handoff is for adapters: set use_peft: true, or leave it out")
        last = entry is chain.entries[-1]
        if stage.makes_adapter and (entry.handoff == "merge" or (entry.handoff == "auto" and not last)):
            stages.append(_merge(stage, chain.output_dir))
        handed_on[entry.name] = _output(stages[-1])
        policy = handed_on[entry.name] if entry.command in POLICIES else policy
    return stages


def _with_references(
    name: str,
    settings: dict[str, yaml.Node],
    handed_on: Mapping[str, Output],
    earlier: list[Stage],
    mistakes: list[str],
) -> dict[str, yaml.Node]:
    """Return a stage's settings with typed references; add a mistake for each that names no earlier stage."""
    outputs, typed = [_output(stage) for stage in earlier], {}
    for key, node in settings.items():
        try:
            typed[key] = with_references(node, handed_on, outputs)
        except ValueError as mistake:
            mistakes.append(f"stage {name}: {key} {mistake}")
            typed[key] = scalar("unknown/reference")  # taken for a name of the Hub, so that no second mistake follows
    return typed


def _stage(entry: Entry, command: str, settings: dict[str, yaml.Node], root: Path) -> Stage:
    """Return the stage of an entry; where step 0 is checked, its settings ask for a log of the first step."""
    stage = Stage(entry.name, command, root / entry.name, settings)
    settings["teacher_cache" if command == "cache" else "output_dir"] = Reference(_output(stage))
    if command not in STEP0_CHECKED:
        return stage
    settings.setdefault("logging_first_step", scalar("true", "bool"))
    logged = plain(settings["logging_first_step"]) is True or plain(settings.get("logging_steps")) == 1
    return replace(stage, tolerance=entry.tolerance if logged else None)


def _merge(adapter: Stage, root: Path) -> Stage:
    """Return the stage that merges the adapter of another stage into its base model."""
    kept = ("dtype", "model_revision", "trust_remote_code")
    settings = {key: adapter.settings[key] for key in kept if key in adapter.settings}
    stage = Stage(f"{adapter.name}-merge", "merge", root / f"{adapter.name}-merge", settings)
    settings["model_name_or_path"] = Reference(_output(adapter))
    settings["output_dir"] = Reference(_output(stage))
    return stage


def _output(stage: Stage) -> Output:
    return Output(stage.name, str(stage.output))
