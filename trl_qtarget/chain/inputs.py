"""Checks of what a stage reads from this machine: the columns of its data, its reward functions, room on the disk."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation import preferences
from ..options.reading import nearest
from ..user_code import NotFound, load
from .commands import OUTPUT
from .nodes import plain
from .plan import Stage


BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # the names under which `datasets` reads local files
COLUMNS = {  # a command reads any one of these sets of columns
    "sft": (("messages",), ("prompt", "completion"), ("conversations",), ("input_ids",)),
    "dpo": (("chosen", "rejected"),),
    "kto": (("completion", "label"), ("chosen", "rejected")),
    "grpo": (("prompt",),),
    "rloo": (("prompt",),),
    "reward": (("chosen", "rejected"),),
}
COLUMNS["cache"] = COLUMNS["sft"]
# by stand-in: the path inside its stage's output, and the columns of each data file that the stage will write
Planned = Mapping[str, tuple[str, Mapping[str, Sequence[str]]]]


def wrong_data(command: str, given: Mapping[str, Any], planned: Planned) -> list[str]:
    """Return a mistake for each local data set that cannot be read or lacks the columns that the command reads."""
    mistakes = []
    for label, arguments in _sources(command, given, planned):
        try:
            columns = _planned_columns(arguments, planned) or _columns(arguments)
        except StopIteration:
            mistakes.append(f"the data {label} is empty")
            continue
        except Exception as mistake:  # a reader of any format may raise anything
            mistakes.append(f"the data {label} cannot be read: {str(mistake).strip().partition(chr(10))[0]}")
            continue
        choices = COLUMNS.get(command, ((given.get("prompt_column"), given.get("answer_column")),))
        if command in ("sft", "cache"):
            choices = (*choices, (given["dataset_text_field"],))
        if not any(set(choice) <= set(columns) for choice in choices):
            needed = ", or ".join(" and ".join(map(str, choice)) for choice in choices)
            mistakes.append(f"the data {label} has the columns {', '.join(columns)}: {command} reads {needed}")
    return mistakes


def _sources(command: str, given: Mapping[str, Any], planned: Planned) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each local data set of a stage: its name in messages, and the arguments of `load_dataset`."""
    if command == "merge":
        return
    if command == "eval":
        kind = Path(given["dataset"]).suffix.removeprefix(".").replace("jsonl", "json")
        if kind in BUILDERS and "://" not in given["dataset"]:
            yield given["dataset"], {"path": kind, "data_files": given["dataset"], "split": "train"}
        return
    for entry in given["datasets"] or []:
        kept = {name: getattr(entry, name) for name in ("path", "name", "data_dir", "data_files", "split")}
        remote = "://" in f"{entry.data_files}{entry.data_dir}"
        if (entry.path in BUILDERS and not remote) or Path(entry.path).exists():
            yield str(entry.data_files or entry.data_dir or entry.path), kept | {"columns": entry.columns}
    folder = given["dataset_name"]
    if not given["datasets"] and folder and (folder in planned or Path(folder).exists()):
        yield folder, {"path": folder, "name": given["dataset_config"], "split": given["dataset_train_split"]}


def _planned_columns(arguments: Mapping[str, Any], planned: Planned) -> Sequence[str] | None:
    """Return the columns of data that an earlier stage will write, None for other data.

    Raises:
        ValueError: the stage writes no such file.
    """
    sources = arguments.get("data_files") or arguments["path"]
    for source in map(str, sources if isinstance(sources, list) else [sources]):
        if source in planned:
            name, files = planned[source]
            if name not in files:
                known = f"that stage writes {', '.join(files)}" if files else "that stage writes no data"
                raise ValueError(f"{known}; an eval with `pairs` writes {preferences.FILE}, to be named as a file")
            return files[name]
    return None


def _columns(arguments: dict[str, Any]) -> list[str]:
    """Return the columns of a data set from its first row, without reading the others."""
    from datasets import load_dataset

    kept = arguments.pop("columns", None)
    arguments["split"] = re.split(r"[\[+]", str(arguments["split"]))[0]  # streams take no "train[:50%]"
    row = next(iter(load_dataset(**arguments, streaming=True)))
    return [column for column in row if kept is None or column in kept]


def wrong_evaluation(args: Any) -> list[str]:
    """Return the mistakes in an `eval` that can be found without its models' tokenizers."""
    from ..evaluation import models
    from ..evaluation.verifiers import find_verifier

    mistakes = []
    for check, names in ((find_verifier, [args.verifier]), (models.check_folder, args.model_name_or_path)):
        for name in names:
            try:
                check(name)
            except ValueError as mistake:
                mistakes.append(str(mistake))
    return mistakes


def wrong_rewards(given: Mapping[str, Any]) -> list[str]:
    """Return a mistake for each reward function that TRL's script could not import, or one if there is no reward."""
    names = given["reward_funcs"] or []
    if not names and not given["reward_model_name_or_path"]:
        return ["no reward: set reward_funcs, or reward_model_name_or_path"]
    return [f"reward_funcs: {name}: {why}" for name in names if (why := _no_reward(name))]


def _no_reward(name: str) -> str | None:
    """Return the reason why `name` is neither one of TRL's rewards nor a `module.function`; None for a reward."""
    source, _, function = name.rpartition(".")
    source = source or "trl.rewards"
    if source.endswith(".py") or function.startswith("py:"):
        return "TRL takes module.function here, and no file"
    try:
        module = load(source)
    except NotFound as mistake:
        return f"importing {source} failed: {mistake}"
    except Exception as mistake:  # the module's own code runs, and may raise anything
        return f"importing {source} failed: {type(mistake).__name__}: {mistake}"
    reward = getattr(module, function, None)
    if reward is None:
        known = getattr(module, "__all__", None) or [key for key, value in vars(module).items() if callable(value)]
        return f"there is no {function} in {module.__name__}{nearest(function, known)}"
    return None if callable(reward) else f"it is {reward!r}, no function"


# The disk


def full_disk(stages: list[Stage], root: Path) -> list[str]:
    """Return a mistake if models and checkpoints will not fit, as far as the sizes of local weights tell."""
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
    """Return the bytes of the weights in a local folder, 0 for a name of the Hub."""
    files = Path(folder).glob("*.safetensors") if isinstance(folder, str) and Path(folder).is_dir() else []
    return sum(file.stat().st_size for file in files)


def _copies(stage: Stage) -> int:
    """Return how many copies of its weights a stage writes; a checkpoint with Adam's two moments counts as three."""
    given = {name: plain(node) for name, node in stage.settings.items()}
    if OUTPUT[stage.command] != "model" or given.get("use_peft") is True:
        return 0
    if stage.command == "merge" or given.get("save_strategy") in (False, "no"):
        return 1
    every = given.get("save_steps", 500)
    steps, every = given.get("max_steps", 0), every if isinstance(every, int) and every > 0 else 500
    number = given.get("save_total_limit") or max(steps // every if isinstance(steps, int) else 0, 1)
    return 1 + number * (1 if given.get("save_only_model") is True else 3)
