"""Unfinished work in `output_dir`: a training goes on from its own checkpoints, and leaves those of others alone.

`qtarget_run.json` in `output_dir` holds the settings that decide what is trained. A training writes the file before
its first step. A later start with the same settings resumes from the newest checkpoint. A start with other settings is
refused: it would continue under another loss or rate, or write its checkpoints over those of the first run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from .. import user_code
from ..files import holds_model, no_folder, remove_model, write_text


RECORD = "qtarget_run.json"
SETTINGS = (  # of the dataclasses of `sft`; a name that a release of TRL or transformers lacks is passed over
    "loss", "loss_kwargs", "trust_floor", "trust_token_ids", "teacher_model_name_or_path", "teacher_model_revision",
    "teacher_model_init_kwargs", "teacher_cache", "teacher_ema_decay",
    "model_name_or_path", "model_revision", "model_init_kwargs", "dtype", "bf16", "fp16", "load_in_8bit",
    "load_in_4bit", "use_peft", "lora_r",
    "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save",
    "use_rslora", "use_dora",
    "dataset_name", "dataset_config", "dataset_train_split", "dataset_conversation", "datasets", "test_split_size",
    "dataset_text_field",
    "chat_template_path", "eos_token", "max_length", "truncation_mode", "packing", "packing_strategy",
    "completion_only_loss",
    "assistant_only_loss", "shuffle_dataset",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "max_steps",
    "num_train_epochs",
    "optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm",
    "neftune_noise_alpha", "average_tokens_across_devices", "dataloader_drop_last", "seed", "data_seed",
)  # fmt: skip
SAMPLED_ROWS = 64


def settings(*values: Any) -> dict[str, Any]:
    """Return the settings that decide what is trained, by name, from the dataclasses of `sft`."""
    known = {f.name: getattr(value, f.name) for value in values for f in fields(value)}
    found = {name: _plain(known[name]) for name in SETTINGS if name in known}
    source, _ = user_code.split(str(known["loss"]))
    file = user_code.file_of(source) if source else None
    if file is not None:
        found["code of the loss"] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return found


def _plain(value: Any) -> Any:
    """Return the value as JSON gives it back; an empty list or mapping is as good as none."""
    return json.loads(json.dumps(None if value in ([], {}) else value, default=_of_object))


def _of_object(value: Any) -> Any:
    if is_dataclass(value):
        return vars(value)
    return getattr(value, "value", None) or type(value).__name__  # enums; an object's text may hold its address


def record(folder: Path) -> dict[str, Any] | None:
    """Return the settings that the training in a folder was started with, or None if nothing says so."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """List the settings of `now` that had another value; empty if there are none. Other settings are not compared."""
    changed = [(name, then[name], value) for name, value in now.items() if name in then and then[name] != value]
    listed = [f"{name} was {json.dumps(old)} and is {json.dumps(new)}" for name, old, new in changed[:4]]
    return "; ".join([*listed, *([f"and {len(changed) - 4} more"] if len(changed) > 4 else [])])


# Before a training is launched


def given_checkpoint(training_args: Any) -> str | bool | None:
    """Return `resume_from_checkpoint` as `Trainer.train` takes it: `true`, `false` and `none` arrive as text."""
    value = training_args.resume_from_checkpoint
    return {"true": True, "false": None, "none": None}.get(str(value).lower(), value)


def mistakes(training_args: Any, now: dict[str, Any], overwrites: bool) -> list[str]:
    """Return why a training may not start in `output_dir`, and what to do; empty if it may.

    now: the `settings` of the training
    overwrites: whether a training that does not resume from the folder replaces what is in it
    """
    folder, given = Path(training_args.output_dir), given_checkpoint(training_args)
    if (reason := no_folder(folder)) is not None:
        return [f"output_dir {folder} cannot be written: {reason}"]
    if isinstance(given, str) and not Path(given, "trainer_state.json").is_file():
        return [f"resume_from_checkpoint: {given} is no checkpoint (no trainer_state.json)"]
    complete = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda file: file.stat().st_mtime)
    if given is True and not complete:
        return [f"resume_from_checkpoint: output_dir {folder} holds no checkpoint; leave it out to start from scratch"]
    elsewhere = isinstance(given, str) and not _is_in(given, folder)
    if given is None or elsewhere:
        if overwrites:
            return []
        if holds_model(folder):
            return [f"output_dir {folder} holds a finished model: {_choices(complete)}"]
        if elsewhere and complete:
            return [f"output_dir {folder} holds checkpoints, and {given} is none of them: {_choices(complete)}"]
    if elsewhere or not complete:
        return []
    then = record(folder)
    if then is None and given is None:
        return [
            f"output_dir {folder} holds checkpoints, and no {RECORD} that says with which settings they were made: "
            f"{_choices([])}; --resume_from_checkpoint true goes on from them all the same"
        ]
    changed = differences(then or {}, now)
    if changed:
        return [
            f"output_dir {folder} holds checkpoints of a run with other settings ({changed}): {_choices(complete)}"
        ]
    if not isinstance(given, str) and newest_checkpoint(folder) is None:
        return [
            f"output_dir {folder} holds checkpoints of the last step only, or without optimizer: {_choices(complete)}"
        ]
    return []


def _choices(complete: list[Path]) -> str:
    """Say how to keep what is in `output_dir`, and how to replace it."""
    newest = f" (it starts from these weights with --resume_from_checkpoint {complete[-1].parent})" if complete else ""
    return f"give another --output_dir{newest}, or replace what is there with --overwrite_output_dir"


def checkpoint(training_args: Any, overwrites: bool) -> str | None:
    """Return the checkpoint that a training without `mistakes` goes on from, None if it starts from scratch."""
    given = given_checkpoint(training_args)
    if isinstance(given, str) or (given is None and overwrites):
        return given
    newest = newest_checkpoint(Path(training_args.output_dir))
    return None if newest is None else str(newest)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the last complete checkpoint that training can continue from.

    A checkpoint of the last step is left out: from it Trainer takes one more step before it looks at max_steps.
    """
    numbered = {path: path.name.rpartition("-")[2] for path in folder.glob("checkpoint-*")}
    ordered = sorted((path for path, step in numbered.items() if step.isdigit()), key=lambda path: int(numbered[path]))
    return next((path for path in reversed(ordered) if _can_continue(path)), None)


def _can_continue(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete, has steps left, and holds an optimizer."""
    try:  # the trainer's state is written last
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if state.get("global_step", 0) >= state.get("max_steps", math.inf):
        return False
    # save_only_model leaves the optimizer out
    return any(any(checkpoint.glob(name)) for name in ("optimizer*", "global_step*", "pytorch_model_fsdp*"))


# Before the first step


def of_trainer(trainer: Any) -> dict[str, Any]:
    """Return the settings that only a trainer knows: the rows of a step over all ranks, and the prepared data."""
    args = trainer.args
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {"rows of a step": rows, "fingerprint of the data": fingerprint(trainer.train_dataset)}


def compare(folder: Path, resumed: str | None, now: dict[str, Any]) -> str | None:
    """Return the line that says which checkpoint a run resumes from, None for a run that starts from scratch.

    Raises:
        ValueError: the checkpoint is of this folder, and was made with other settings.
    """
    if resumed is None:
        return None
    changed = differences(record(Path(resumed).parent) or {}, now)
    if changed and _is_in(resumed, folder):
        raise ValueError(f"{resumed} was made with other settings ({changed}): {_choices([])}.")
    return f"Resuming from {resumed}, made with {f'other settings: {changed}' if changed else 'these settings'}."


def begin(folder: Path, resumed: str | None, now: dict[str, Any]) -> None:
    """Write the settings of a run into its `output_dir`, and remove checkpoints and model of a run that it replaces.

    A later start would resume from checkpoints that are left, or take a model that is left for the finished one.
    """
    if not _is_in(resumed, folder):
        for replaced in folder.glob("checkpoint-*/trainer_state.json"):
            shutil.rmtree(replaced.parent)
        remove_model(folder)
    write_text(folder / RECORD, json.dumps(now, indent=2, sort_keys=True) + "\n")


def _is_in(checkpoint: str | None, folder: Path) -> bool:
    return checkpoint is not None and Path(checkpoint).resolve().parent == folder.resolve()


def fingerprint(dataset: Any) -> str:
    """Return a hash of the length of a dataset and of up to 64 of its rows; of a stream, of its first row."""
    if hasattr(dataset, "__len__"):
        size = len(dataset)
        rows: Iterable[Any] = (dataset[i * size // SAMPLED_ROWS] for i in range(SAMPLED_ROWS if size else 0))
    else:
        size, rows = -1, itertools.islice(dataset, 1)
    total = hashlib.sha256(str(size).encode())
    for row in rows:
        total.update(json.dumps(row, sort_keys=True, default=_of_object).encode())
    return total.hexdigest()[:16]
