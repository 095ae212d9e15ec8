"""A look at what a stage reads from this machine: columns of data, reward functions, room on the disk."""

import importlib
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation import preferences
from ..options.reading import nearest
from .plan import OUTPUT, Stage, plain


BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # of `datasets`, for files
COLUMNS = {  # any of these sets will do
    "sft": (("messages",), ("prompt", "completion"), ("conversations",), ("input_ids",)),
    "dpo": (("chosen", "rejected"),),
    "kto": (("completion", "label"), ("chosen", "rejected")),
    "grpo": (("prompt",),),
    "rloo": (("prompt",),),
    "reward": (("chosen", "rejected"),),
}
COLUMNS["cache"] = COLUMNS["sft"]
Planned = Mapping[str, Mapping[str, Sequence[str]]]  # folders of stages to come -> files of data in them -> columns


def wrong_data(command: str, named: dict[str, Any], planned: Planned) -> list[str]:
    """Local data that is not there, or whose columns are not those that the command reads."""
    found = []
    for label, arguments in _sources(command, named, planned):
        try:
            columns = _planned_columns(arguments, planned) or _columns(arguments)
        except StopIteration:
            found.append(f"the data {label} is empty")
            continue
        except Exception as mistake:  # of any reader of any format
            found.append(f"the data {label} cannot be read: {str(mistake).strip().partition(chr(10))[0]}")
            continue
        choices = COLUMNS.get(command, ((named.get("prompt_column"), named.get("answer_column")),))
        if command in ("sft", "cache"):
            choices = (*choices, (named["dataset_text_field"],))
        if not any(set(choice) <= set(columns) for choice in choices):
            needed = ", or ".join(" and ".join(map(str, choice)) for choice in choices)
            found.append(f"the data {label} has the columns {', '.join(columns)}: {command} reads {needed}")
    return found


def _sources(command: str, named: dict[str, Any], planned: Planned) -> Iterator[tuple[str, dict[str, Any]]]:
    """The local data sets of a stage, as arguments of `load_dataset`."""
    if command == "merge":
        return
    if command == "eval":
        kind = Path(named["dataset"]).suffix.removeprefix(".").replace("jsonl", "json")
        if kind in BUILDERS and "://" not in named["dataset"]:
            yield named["dataset"], {"path": kind, "data_files": named["dataset"], "split": "train"}
        return
    for entry in named["datasets"] or []:
        kept = {name: getattr(entry, name) for name in ("path", "name", "data_dir", "data_files", "split")}
        remote = "://" in f"{entry.data_files}{entry.data_dir}"
        if (entry.path in BUILDERS and not remote) or Path(entry.path).exists():
            yield str(entry.data_files or entry.data_dir or entry.path), kept | {"columns": entry.columns}
    folder = named["dataset_name"]
    if not named["datasets"] and folder and (folder in planned or Path(folder).exists()):
        yield folder, {"path": folder, "name": named["dataset_config"], "split": named["dataset_train_split"]}


def _planned_columns(arguments: dict[str, Any], planned: Planned) -> Sequence[str] | None:
    """Those of data that an earlier stage will write; None for other data.

    Raises:
        ValueError: the stage writes no such file.
    """
    given = arguments.get("data_files") or arguments["path"]
    for file in map(str, given if isinstance(given, list) else [given]):
        for folder, files in planned.items():
            if file == folder or file.startswith(folder + "/"):
                name = file.removeprefix(folder).removeprefix("/")
                if name not in files:
                    known = f"that stage writes {', '.join(files)}" if files else "that stage writes no data"
                    raise ValueError(f"{known}; an eval with `pairs` writes {preferences.FILE}, to be named as a file")
                return files[name]
    return None


def _columns(arguments: dict[str, Any]) -> list[str]:
    """Those of the first row, without reading the others."""
    from datasets import load_dataset

    kept = arguments.pop("columns", None)
    arguments["split"] = re.split(r"[\[+]", str(arguments["split"]))[0]  # streams take no "train[:50%]"
    row = next(iter(load_dataset(**arguments, streaming=True)))
    return [column for column in row if kept is None or column in kept]


def wrong_evaluation(args: Any) -> list[str]:
    """What `eval` would refuse, without its models' tokenizers."""
    from ..evaluation import models
    from ..evaluation.verifiers import find_verifier

    found = []
    for check, given in ((find_verifier, [args.verifier]), (models.check_folder, args.model_name_or_path)):
        for name in given:
            try:
                check(name)
            except ValueError as mistake:
                found.append(str(mistake))
    return found


def wrong_rewards(named: dict[str, Any]) -> list[str]:
    """Reward functions that cannot be imported, as TRL's scripts do: names of TRL's, or module.function from here."""
    names = named["reward_funcs"] or []
    if not names and not named["reward_model_name_or_path"]:
        return ["no reward: set reward_funcs, or reward_model_name_or_path"]
    return [f"reward_funcs: {name}: {why}" for name in names if (why := _no_reward(name))]


def _no_reward(name: str) -> str | None:
    module, _, function = name.rpartition(".")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module or "trl.rewards")
    except Exception as mistake:  # the module's own code runs
        return f"importing {module} failed: {type(mistake).__name__}: {mistake}"
    known = getattr(found, "__all__", None) or [key for key, value in vars(found).items() if callable(value)]
    made = getattr(found, function, None)
    if made is None:
        return f"there is no {function} in {found.__name__}{nearest(function, known)}"
    return None if callable(made) else f"it is {made!r}, no function"


# The disk


def full_disk(stages: list[Stage], root: Path) -> list[str]:
    """Whether models and checkpoints will not fit, as far as sizes are known here: weights in local folders."""
    base = next((size for stage in stages if (size := _weights(plain(stage.settings.get("model_name_or_path"))))), 0)
    needed = sum(base * _copies(stage) for stage in stages)
    existing = next(path for path in (root.resolve(), *root.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed <= free:
        return []
    return [
        f"output_dir {root}: models and checkpoints take about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB "
        "are free: set save_total_limit, or save_strategy: 'no'"
    ]


def _weights(folder: Any) -> int:
    files = Path(folder).glob("*.safetensors") if isinstance(folder, str) and Path(folder).is_dir() else []
    return sum(file.stat().st_size for file in files)


def _copies(stage: Stage) -> int:
    """How many times the weights: a checkpoint of full training holds Adam's two moments too."""
    given = {name: plain(node) for name, node in stage.settings.items()}
    if OUTPUT[stage.command] != "model" or given.get("use_peft") is True:
        return 0
    if stage.command == "merge" or given.get("save_strategy") in (False, "no"):
        return 1
    every = given.get("save_steps", 500)
    steps, every = given.get("max_steps", 0), every if isinstance(every, int) and every > 0 else 500
    number = given.get("save_total_limit") or max(steps // every if isinstance(steps, int) else 0, 1)
    return 1 + number * (1 if given.get("save_only_model") is True else 3)
