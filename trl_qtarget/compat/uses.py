"""Functions that touch the private names of trainers, models, adapters and commands."""

from __future__ import annotations

import argparse
import importlib
import subprocess
from collections.abc import Iterable
from importlib import resources
from typing import Any

from .names import changed, find
from .releases import version


ACCELERATE_LAUNCH = "accelerate.commands.launch"  # the module behind `accelerate launch`, and the name of its logger


# Trainers


def tokenizer(trainer: Any) -> Any:
    """Return the tokenizer of an SFTTrainer, also where its processing class is a processor of text and images."""
    return trainer._tokenizer


def trains_on_images(trainer: Any) -> bool:
    """Whether an SFTTrainer reads the train dataset as images and text."""
    return trainer._is_vision_dataset


def metrics(trainer: Any, mode: str) -> dict[str, list[float]]:
    """Return the values that an SFTTrainer has collected since its last log; `mode` is "train" or "eval"."""
    return trainer._metrics[mode]


def count_train_tokens(trainer: Any, tokens: int) -> int:
    """Add `tokens` to the tokens that an SFTTrainer has trained on, and return their number."""
    trainer._total_train_tokens += tokens
    return trainer._total_train_tokens


def keep_columns(trainer: Any, names: Iterable[str]) -> None:
    """Add `names` to the dataset columns that Trainer hands to the collator; Trainer drops every other column."""
    kept = getattr(trainer, "_signature_columns", None)
    if not isinstance(kept, list):
        raise changed("transformers.Trainer._signature_columns")
    trainer._signature_columns = list(dict.fromkeys([*kept, *names]))


def column_names(dataset: Any) -> list[str]:
    """Return the columns of a dataset; a stream that does not declare its columns is asked for its first row."""
    return find("trl.data_utils:get_dataset_column_names")(dataset)


def split_warmup(args: Any) -> None:
    """Move a fraction in `warmup_steps` to `warmup_ratio`, where release 4 of transformers wants a fraction."""
    if not hasattr(args, "warmup_ratio"):
        return
    if 0 < args.warmup_steps < 1:
        args.warmup_ratio, args.warmup_steps = args.warmup_steps, 0
    elif args.warmup_steps == int(args.warmup_steps):
        args.warmup_steps = int(args.warmup_steps)


# Models


def create_model(path: str, **kwargs: Any) -> Any:
    """Load a model as TRL does: the architecture that its config names, in float32 unless `kwargs` give a dtype."""
    return find("trl.trainer.utils:create_model_from_path")(path, **kwargs)


def backbone(model: Any) -> Any:
    """Return the part of a model below the head, which ends in hidden states.

    Transformers names the backbone by `base_model_prefix`. Some classes leave the prefix empty or wrong: the backbone
    is then `model.model`.

    Raises:
        ValueError: the model has neither.
    """
    named = model.base_model
    found = getattr(model, "model", None) if named is model else named
    if found is None:
        raise ValueError(
            f"{type(model).__name__} of transformers {version('transformers')} keeps its backbone where trl_qtarget "
            "does not find it: train it with TRL's SFTTrainer, and please report the model's name."
        )
    return found


def forward_of_instance(model: Any) -> Any:
    """Return the forward that was set on a model itself, or None where the model has that of its class alone.

    A forward set by TRL's fused head counts as none: this package replaces that head, and a deep copy would run the
    original's weights through it.
    """
    found = model.__dict__.get("forward")
    code = getattr(getattr(found, "__func__", None), "__code__", None)
    return None if code is not None and code.co_name == "_fused_forward" else found


def balancing_loss(router_logits: Any, experts: int, chosen: int, attention_mask: Any) -> Any:
    """Return the load-balancing loss of a mixture that routes each token to `chosen` of its `experts`."""
    balance = find("transformers.models.mixtral.modeling_mixtral:load_balancing_loss_func")
    return balance(router_logits, experts, chosen, attention_mask)


def targets_module(config: Any, name: str) -> bool:
    """Whether the `target_modules` of a PEFT configuration select the module called `name`."""
    return bool(find("peft.tuners.tuners_utils:check_target_module_exists")(config, name))


# Commands


def accelerate_profiles() -> dict[str, str]:
    """Return TRL's configuration files for accelerate, by the name that `--accelerate_config` takes."""
    try:
        files = [*resources.files("trl.accelerate_configs").iterdir()]
    except ModuleNotFoundError as missing:
        raise changed("trl.accelerate_configs") from missing
    return {file.name.removesuffix(".yaml"): str(file) for file in files if file.name.endswith(".yaml")}


def launch_parser() -> argparse.ArgumentParser:
    """Return the parser of `accelerate launch`."""
    return find("accelerate.commands.launch:launch_command_parser")()


def launch_settings(args: argparse.Namespace) -> argparse.Namespace:
    """Fill options of `accelerate launch` in from its configuration file and this machine, and check them.

    Raises:
        ValueError: options that contradict each other.
    """
    return find("accelerate.commands.launch:_validate_launch_command")(args)[0]


def run_launch(args: argparse.Namespace) -> None:
    """Run `accelerate launch` with parsed options, and return when every process has ended."""
    find("accelerate.commands.launch:launch_command")(args)


def trl_commands() -> dict[str, str]:
    """Return the help of TRL's commands by name; empty where the installed TRL keeps its list elsewhere."""
    try:
        return {command.name: command.help_text for command in find("trl.cli.commands:get_commands")()}
    except (ImportError, AttributeError):
        return {}


def run_trl(argv: list[str]) -> int:
    """Run a command of TRL, in this process where TRL has `trl.cli.main` and as a program otherwise."""
    try:
        main = find("trl.cli:main")
    except ImportError:
        return subprocess.call(["trl", *argv])
    return main(argv)


def script_arguments(command: str) -> Any:
    """Return the dataclasses that hold the options of TRL's script `command`.

    Raises:
        ImportError: the installed TRL has no such script, or the script has no parser.
    """
    try:
        return importlib.import_module(f"trl.scripts.{command}").make_parser().dataclass_types
    except (ImportError, AttributeError) as missing:
        raise changed(f"trl.scripts.{command}.make_parser().dataclass_types") from missing
