"""Tables of the private names that each feature needs, and the checks that name one which a release has changed."""

from __future__ import annotations

import inspect
import pkgutil
from collections import defaultdict
from collections.abc import Sized
from typing import Any

from .releases import tested, version


# By feature: every function of another package that is called or overridden although no release promises it, and the
# parameters that it must begin with. A name is checked when its feature is used, and not before: FSDP's names do not
# stop a run on one CPU.
NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "a trainer": {
        "transformers:Trainer._get_output_dir": ("self", "trial"),
        "transformers:Trainer._load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
        "transformers:Trainer._save_checkpoint": ("self", "model", "trial"),
        "transformers:Trainer.evaluate": ("self", "eval_dataset", "ignore_keys", "metric_key_prefix"),
        "transformers:Trainer.get_batch_samples": ("self", "epoch_iterator", "num_batches", "device"),
        "transformers:TrainerCallback.on_train_begin": ("self", "args", "state", "control"),
        "trl:SFTTrainer._prepare_dataset": (
            "self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name",
        ),
        "trl:SFTTrainer._set_signature_columns_if_needed": ("self",),
        "trl:SFTTrainer.compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
        "trl:SFTTrainer.evaluate": ("self", "eval_dataset", "ignore_keys", "metric_key_prefix"),
        "trl:SFTTrainer.log": ("self", "logs", "start_time"),
        "trl.data_utils:get_dataset_column_names": ("dataset",),
    },
    "a second model": {"trl.trainer.utils:create_model_from_path": ("model_id",)},
    "a second model under DeepSpeed": {"trl.models.utils:prepare_deepspeed": ("model", "accelerator")},
    "a second model under FSDP1": {"trl.models.utils:prepare_fsdp": ("model", "accelerator")},
    "a second model under FSDP2": {"accelerate.utils:fsdp2_prepare_model": ("accelerator", "model")},
    "a mixture of experts": {
        "transformers.models.mixtral.modeling_mixtral:load_balancing_loss_func": (
            "gate_logits", "num_experts", "top_k", "attention_mask",
        ),
    },
    "adapters": {"peft.tuners.tuners_utils:check_target_module_exists": ("config", "key")},
    "options": {"trl:TrlParser.parse_args_and_config": ("self", "args")},
    "accelerate launch": {
        "accelerate.commands.launch:_validate_launch_command": ("args",),
        "accelerate.commands.launch:launch_command": ("args",),
        "accelerate.commands.launch:launch_command_parser": (),
    },
    "commands of TRL": {  # without these two, `trl-qtarget` runs `trl` as a program
        "trl.cli:main": (),
        "trl.cli.commands:get_commands": (),
    },
    "a chain": {f"trl.scripts.{name}:make_parser": () for name in ("dpo", "grpo", "kto", "reward", "rloo")},
    "a model card": {  # checked by tests alone: without them the card cites TRL's own paper, and no run goes wrong
        "trl:SFTTrainer._name": (),
        "trl:SFTTrainer._paper": (),
        "trl:SFTTrainer._tag_names": (),
    },
}  # fmt: skip

PARAMETERS = {name: parameters for names in NAMES.values() for name, parameters in names.items()}

# The attributes that `SFTTrainer.__init__` sets and `TargetSFTTrainer` reads
TRAINER_ATTRIBUTES: dict[str, type] = {
    "_metrics": dict,  # {"train": {name: [values]}, "eval": ...}, averaged and cleared by `log`
    "_total_train_tokens": int,
    "_tokenizer": Sized,
    "_tp_size": int,
    "aux_loss_enabled": bool,
    "_is_vision_dataset": bool,
}


def find(name: str) -> Any:
    """Return the object at `module:name`, which must begin with the parameters that `NAMES` lists for it.

    Raises:
        ImportError: the installed version lacks the name or has changed its parameters; the message names the tested
            versions.
    """
    parameters = PARAMETERS.get(name, ())
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as missing:
        raise changed(name.replace(":", ".")) from missing
    if parameters and tuple(inspect.signature(found).parameters)[: len(parameters)] != parameters:
        raise changed(f"{name.replace(':', '.')}({', '.join(parameters)}, ...)")
    return found


def changed(name: str) -> ImportError:
    """Return the error for a name, `package.path`, that the installed version of its package lacks or has changed."""
    package = name.partition(".")[0]
    return ImportError(
        f"{package} {version(package)} has changed what trl_qtarget relies on: {name}. "
        f"Tested with {tested()}: install a version of that range."
    )


def check_names(feature: str = "a trainer") -> None:
    """Raise an ImportError for the first private name of a feature that an installed version lacks or has changed."""
    for name in NAMES[feature]:
        find(name)


def check_trainer(trainer: Any) -> None:
    """Raise an ImportError for the first private attribute that the installed TRL no longer sets in a trainer."""
    for name, kind in TRAINER_ATTRIBUTES.items():
        if not isinstance(getattr(trainer, name, None), kind):
            raise changed(f"trl.SFTTrainer.{name}")
    if not all(isinstance(trainer._metrics.get(mode), defaultdict) for mode in ("train", "eval")):
        raise changed("trl.SFTTrainer._metrics['train'] and ['eval']")
    if trainer.aux_loss_enabled:
        check_names("a mixture of experts")
        if not hasattr(trainer, "router_aux_loss_coef"):
            raise changed("trl.SFTTrainer.router_aux_loss_coef")
