"""Functions that ask or use the engine of a run: tensor and sequence parallelism, DeepSpeed, FSDP."""

from __future__ import annotations

import copy
import os
from typing import Any

from .names import changed, find


def tensor_parallel_size(trainer: Any) -> int:
    """Return the number of ranks that tensor parallelism gives the same batch."""
    return trainer._tp_size


def parallelism_config(args: Any) -> Any:
    """Return the parallelism that the arguments or else the environment of accelerate's launcher give, or None."""
    given = getattr(args, "parallelism_config", None)
    if given is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        from accelerate.parallelism_config import ParallelismConfig

        given = ParallelismConfig()
    return given


def sequence_parallel_size(parallelism_config: Any) -> int:
    """Return the number of ranks that share a sequence (Ulysses); 1 where accelerate is too old to have the option."""
    return getattr(parallelism_config, "sp_size", None) or 1


def summed_parts(accelerator: Any) -> int:
    """Return the number of ranks of one sequence (Ulysses) over which DeepSpeed sums gradients.

    DeepSpeed takes the mean over all other ranks. ZeRO-3 takes the mean over the ranks of a sequence too, unless
    `reduce_scatter` is off: the number is then 1.
    """
    parts = sequence_parallel_size(accelerator.parallelism_config)
    if parts == 1:
        return 1
    zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    return 1 if zero["stage"] == 3 and zero.get("reduce_scatter", True) else parts


def rows_before_repeats(accelerator: Any) -> int | None:
    """Return how many rows of this rank's batch the dataset has, or None if accelerate has repeated no row in it.

    Accelerate repeats rows in the last batch alone, until all ranks have equally many. The first `remainder` rows of
    the batch, counted over all ranks, are rows of the dataset.
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
    """Whether each rank holds only a shard of the trained weights (FSDP, ZeRO-3)."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    sharded = plugin is not None and plugin.zero_stage == 3
    return sharded or getattr(accelerator.state, "fsdp_plugin", None) is not None


# ZeRO-3


ZERO3_ATTRIBUTES = ("ds_id", "ds_shape", "ds_status")  # DeepSpeed puts all of them on each parameter that it shards


def _is_under_zero3(parameter: Any) -> bool:
    missing = [name for name in ZERO3_ATTRIBUTES if not hasattr(parameter, name)]
    if 0 < len(missing) < len(ZERO3_ATTRIBUTES):
        raise changed(f"deepspeed.zero.Init.{missing[0]}")
    return not missing


def is_zero3_shard(parameter: Any) -> bool:
    """Whether this rank holds only its ZeRO-3 shard of a parameter: ZeRO-3 manages it, and it is not gathered."""
    return _is_under_zero3(parameter) and parameter.ds_status.name != "AVAILABLE"


def zero3_shape(parameter: Any) -> Any:
    """Return the shape of a parameter as the model defines it, also where ZeRO-3 keeps none of its rows here."""
    return parameter.ds_shape if _is_under_zero3(parameter) else parameter.shape


# Frozen models


def prepare_frozen(model: Any, accelerator: Any, placed: bool = True) -> Any:
    """Place a frozen model as the engine of the run wants it; the engine shards it if it shards the trained model.

    `placed=False` leaves a model that is not sharded on its device. A DeepSpeed engine is made for ZeRO-3 alone:
    without ZeRO-3 there is nothing to shard, and the engine would check batch sizes that a frozen model does not have.
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
    """Shard a frozen model with accelerate's FSDP2, which broadcasts weights that only rank 0 has read.

    TRL's own function for FSDP2 broadcasts nothing. The plugin names the layers of the trained model. If a frozen
    model of another family lacks some of them, the layers that its own family names are wrapped too.
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
