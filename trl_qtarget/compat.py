"""What the package leans on in TRL, transformers and accelerate that no release promises, and what it was tried with.

A release that moves one of these names is caught when a trainer is made, by name, and not in the numbers of a run.
`python -m trl_qtarget.compat` prints what an issue report needs. Nothing is imported before it is asked for: the
command line takes its versions from here.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import pkgutil
import platform
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sized
from importlib.metadata import PackageNotFoundError, version
from typing import Any


# First and last minor release that `make test-versions` runs
TESTED = {"trl": ("1.15", "1.16"), "transformers": ("4.56", "5.23"), "peft": ("0.15", "0.21")}

PACKAGES = ("trl", "transformers", "torch", "accelerate", "datasets", "peft", "deepspeed", "bitsandbytes", "triton")

# What is called or overridden, and the parameters it must begin with: a trainer needs all of these
NAMES: dict[str, tuple[str, ...]] = {
    "accelerate.utils:fsdp2_prepare_model": ("accelerator", "model"),
    "trl:SFTTrainer._prepare_dataset": (
        "self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name",
    ),
    "trl:SFTTrainer._set_signature_columns_if_needed": ("self",),
    "trl:SFTTrainer.compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    "trl:SFTTrainer.log": ("self", "logs", "start_time"),
    "trl.data_utils:get_dataset_column_names": ("dataset",),
    "trl.models.utils:prepare_deepspeed": ("model", "accelerator"),
    "trl.models.utils:prepare_fsdp": ("model", "accelerator"),
    "trl.trainer.utils:create_model_from_path": ("model_id",),
    "transformers:Trainer._get_output_dir": ("self", "trial"),
    "transformers:Trainer._load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
    "transformers:Trainer._save_checkpoint": ("self", "model", "trial"),
}  # fmt: skip

# What a mixture of experts needs besides
BALANCING = "transformers.models.mixtral.modeling_mixtral:load_balancing_loss_func"
NAMES_OF_EXPERTS = {BALANCING: ("gate_logits", "num_experts", "top_k", "attention_mask")}

# What the command line needs; for those of `trl.cli` it has another way
NAMES_OF_COMMANDS: dict[str, tuple[str, ...]] = {
    "accelerate.commands.launch:_validate_launch_command": ("args",),
    "accelerate.commands.launch:launch_command": ("args",),
    "accelerate.commands.launch:launch_command_parser": (),
    "trl.cli:main": (),
    "trl.cli.commands:get_commands": (),
}

# What `SFTTrainer.__init__` leaves behind and `TargetSFTTrainer` reads: name, type
TRAINER_ATTRIBUTES: dict[str, type] = {
    "_metrics": dict,  # {"train": {name: [values]}, "eval": ...}, averaged and cleared by `log`
    "_total_train_tokens": int,
    "_tokenizer": Sized,
    "aux_loss_enabled": bool,
    "_is_vision_dataset": bool,
}


# Versions


def tested() -> str:
    """The tested range, in words."""
    return ", ".join(f"{package} {first} to {last}" for package, (first, last) in TESTED.items())


def versions() -> dict[str, str]:
    """The version of each package that matters, or "not installed"."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def outside() -> list[str]:
    """The packages whose minor release lies outside the tested range, with their versions."""
    from packaging.version import Version

    found = versions()
    return [
        f"{package} {found[package]}"
        for package, (first, last) in TESTED.items()
        if found[package] != "not installed"
        and not Version(first).release <= Version(found[package]).release[:2] <= Version(last).release
    ]


@functools.cache  # once a process
def warn_if_outside() -> None:
    """Warn of versions that nobody has tried."""
    if outside():
        warnings.warn(
            f"trl_qtarget is tested with {tested()}; installed is {', '.join(outside())}: compare `--loss nll` "
            "with TRL's own loss before you rely on it, or install a version of that range.",
            stacklevel=3,
        )


def about() -> list[str]:
    """What `trl-qtarget --version` says, a line each; without importing what it speaks of."""
    installed = [f"{package} {found}" for package, found in versions().items()]
    there = f"tested with {tested()}; outside of that: {', '.join(outside()) or 'nothing'}"
    own = pkgutil.resolve_name("trl_qtarget:__version__")  # an import would lead up to the trainer
    return [f"trl-qtarget {own}", f"python {platform.python_version()}", *installed, there]


def report() -> None:
    """Print what an issue report needs."""
    print("\n".join([*about(), *_machine()]))  # noqa: T201


def _machine() -> Iterator[str]:
    import torch

    from .loss.backends import tiles_for

    device = torch.device("cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "cpu")
    yield f"platform {platform.platform()}"
    yield f"CUDA {torch.version.cuda or 'none'}, ROCm {torch.version.hip or 'none'}"
    yield from (f"GPU {i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))
    yield f"device {device.type}, qtarget_backend=auto is {tiles_for('auto', device).__name__.rpartition('.')[2]}"


# Private names


def find(name: str, parameters: tuple[str, ...] = ()) -> Any:
    """The object at `module:name`, which takes `parameters` first.

    Raises:
        ImportError: what the installed version no longer has, and which versions do.
    """
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        raise _moved(name.replace(":", ".")) from None
    if tuple(inspect.signature(found).parameters)[: len(parameters)] != parameters:
        raise _moved(f"{name.replace(':', '.')}({', '.join(parameters)}, ...)")
    return found


def _moved(name: str) -> ImportError:
    package = name.partition(".")[0]
    return ImportError(
        f"{package} {version(package)} has changed what trl_qtarget relies on: {name}. "
        f"Tested with {tested()}: install a version of that range."
    )


def check_names() -> None:
    """Raise an ImportError naming what the installed versions no longer have, before a trainer is made."""
    for name, parameters in NAMES.items():
        find(name, parameters)


def check_trainer(trainer: Any) -> None:
    """Raise an ImportError naming what the installed TRL no longer leaves in a trainer."""
    for name, kind in TRAINER_ATTRIBUTES.items():
        if not isinstance(getattr(trainer, name, None), kind):
            raise _moved(f"trl.SFTTrainer.{name}")
    if not all(isinstance(trainer._metrics.get(mode), defaultdict) for mode in ("train", "eval")):
        raise _moved("trl.SFTTrainer._metrics['train'] and ['eval']")
    if trainer.aux_loss_enabled:
        find(BALANCING, NAMES_OF_EXPERTS[BALANCING])
        if not hasattr(trainer, "router_aux_loss_coef"):
            raise _moved("trl.SFTTrainer.router_aux_loss_coef")


def create_model(path: str, **kwargs: Any) -> Any:
    """TRL's own way from a path to a model: the architecture its config names, float32 unless told otherwise."""
    return find("trl.trainer.utils:create_model_from_path")(path, **kwargs)


def backbone(model: Any) -> Any:
    """The part of a model that ends in hidden states, below the head.

    Transformers names it by `base_model_prefix`, which some classes leave empty or wrong: then it is `model.model`.

    Raises:
        ValueError: neither is there.
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
    """A forward that was set on this very model, or None.

    TRL's own fused head is left out: this package does not use it, and it holds on to the model that it was made for,
    so that a deep copy would run the original's weights.
    """
    found = model.__dict__.get("forward")
    code = getattr(getattr(found, "__func__", None), "__code__", None)
    return None if code is not None and code.co_name == "_fused_forward" else found


def column_names(dataset: Any) -> list[str]:
    """The columns of a dataset; of a stream that does not say, those of its first row."""
    return find("trl.data_utils:get_dataset_column_names")(dataset)


def balancing_loss(router_logits: Any, experts: int, chosen: int, attention_mask: Any) -> Any:
    """The load-balancing loss of a mixture that routes each token to `chosen` of its `experts`."""
    return find(BALANCING)(router_logits, experts, chosen, attention_mask)


def split_warmup(args: Any) -> None:
    """Write `warmup_steps` as the installed transformers reads it: release 4 has `warmup_ratio` for a fraction."""
    if not hasattr(args, "warmup_ratio"):
        return
    if 0 < args.warmup_steps < 1:
        args.warmup_ratio, args.warmup_steps = args.warmup_steps, 0
    elif args.warmup_steps == int(args.warmup_steps):
        args.warmup_steps = int(args.warmup_steps)


# Engines


def tensor_parallel_size(trainer: Any) -> int:
    """How many ranks were given the same batch."""
    return getattr(trainer, "_tp_size", 1)


def parallelism_config(args: Any) -> Any:
    """What the arguments say of it or, as accelerate reads it, what its launcher left in the environment; or None."""
    given = getattr(args, "parallelism_config", None)
    if given is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        from accelerate.parallelism_config import ParallelismConfig

        given = ParallelismConfig()
    return given


def sequence_parallel_size(parallelism_config: Any) -> int:
    """Over how many ranks a sequence is split (Ulysses), for any accelerate that knows of it."""
    return getattr(parallelism_config, "sp_size", None) or 1


def summed_parts(accelerator: Any) -> int:
    """Over how many ranks of one sequence (Ulysses) DeepSpeed sums gradients, where it takes their mean elsewhere.

    ZeRO-3 takes the mean over these too, unless it is told not to scatter.
    """
    parts = sequence_parallel_size(accelerator.parallelism_config)
    if parts == 1:
        return 1
    zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    return 1 if zero["stage"] == 3 and zero.get("reduce_scatter", True) else parts


def rows_before_repeats(accelerator: Any) -> int | None:
    """How many rows of this rank's batch the data has, if accelerate may have repeated rows in it; else None.

    Only the last batch has repeated rows: its first `remainder` rows, counted over all ranks, are those of the data.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return None
    loader = state.active_dataloader
    sampler = getattr(loader, "batch_sampler", None)
    ranks = getattr(sampler, "num_processes", accelerator.num_processes)
    rank = getattr(sampler, "process_index", accelerator.process_index)
    size = loader.total_batch_size // ranks
    return max(min(state.remainder - rank * size, size), 0)


def shards_weights(accelerator: Any) -> bool:
    """Whether a rank holds parts of the trained weights only (FSDP, ZeRO-3)."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    sharded = plugin is not None and plugin.zero_stage == 3
    return sharded or getattr(accelerator.state, "fsdp_plugin", None) is not None


def prepare_frozen(model: Any, accelerator: Any, placed: bool = True) -> Any:
    """Place a model that is only read where the engine in use wants it, sharded if the trained one is.

    What is not to be `placed`, and not sharded, stays where it is.
    A DeepSpeed engine is made for ZeRO-3 alone: below it there is nothing to shard, and the engine would check batch
    sizes that a frozen model does not have.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        return find("trl.models.utils:prepare_deepspeed")(model, accelerator)
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version == 2:
        return _shard_frozen(model, accelerator)
    if fsdp is not None:
        return find("trl.models.utils:prepare_fsdp")(model, accelerator)
    return accelerator.prepare_model(model, device_placement=None if placed else False, evaluation_mode=True)


def _shard_frozen(model: Any, accelerator: Any) -> Any:
    """FSDP2 by accelerate, which hands weights on where only the first process has read them (TRL's own does not).

    It may be of another family than the trained one: of the layers named for that, those are wrapped that it has, and
    where it lacks any, its own.
    """
    plugin = accelerator.state.fsdp_plugin
    named = plugin.transformer_cls_names_to_wrap or ()
    there = {type(module).__name__ for module in model.modules()}
    wrapped = [name for name in named if name in there]
    if wrapped and len(wrapped) < len(named):
        wrapped += getattr(model, "_no_split_modules", None) or ()
    accelerator.state.fsdp_plugin = copy.copy(plugin)
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = wrapped or None
    try:
        return find("accelerate.utils:fsdp2_prepare_model")(accelerator, model)
    finally:
        accelerator.state.fsdp_plugin = plugin


if __name__ == "__main__":
    report()
