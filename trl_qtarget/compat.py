"""Every private name of TRL and accelerate that the package leans on, and the range it was tried with.

A release that moves one of them is caught when a trainer is made, by name, and not in the numbers of a run.
"""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from typing import Any


TESTED_TRL = ("1.15.0", "1.16.0")

# What `SFTTrainer.__init__` leaves behind and `TargetSFTTrainer` reads: name, type
TRAINER_ATTRIBUTES: dict[str, type] = {
    "_metrics": dict,  # {"train": {name: [values]}, "eval": ...}, averaged and cleared by `log`
    "_total_train_tokens": int,
    "aux_loss_enabled": bool,
    "_is_vision_dataset": bool,
}


def check_trainer(trainer: Any) -> None:
    """Raise an ImportError naming what the installed TRL no longer has."""
    import trl

    missing = [name for name, kind in TRAINER_ATTRIBUTES.items() if not isinstance(getattr(trainer, name, None), kind)]
    metrics = getattr(trainer, "_metrics", {})
    if not missing and not all(isinstance(metrics.get(mode), defaultdict) for mode in ("train", "eval")):
        missing = ["_metrics['train'], _metrics['eval']"]
    if missing:
        raise ImportError(
            f"TRL {trl.__version__} has changed what trl_qtarget relies on: SFTTrainer.{', '.join(missing)}. "
            f"Tested with TRL {TESTED_TRL[0]} to {TESTED_TRL[1]}: install one of these."
        )


def create_model(path: str, **kwargs: Any) -> Any:
    """TRL's own way from a path to a model: the architecture its config names, float32 unless told otherwise."""
    from trl.trainer.utils import create_model_from_path

    return create_model_from_path(path, **kwargs)


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


def shards_weights(accelerator: Any) -> bool:
    """Whether a rank holds parts of the trained weights only (FSDP, ZeRO-3)."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    sharded = plugin is not None and plugin.zero_stage == 3
    return sharded or getattr(accelerator.state, "fsdp_plugin", None) is not None


def prepare_frozen(model: Any, accelerator: Any) -> Any:
    """Place a model that is only read where the engine in use wants it, sharded if the trained one is.

    A DeepSpeed engine is made for ZeRO-3 alone: below it there is nothing to shard, and the engine would check batch
    sizes that a frozen model does not have.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        from trl.models.utils import prepare_deepspeed

        return prepare_deepspeed(model, accelerator)
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version == 2:
        return _shard_frozen(model, accelerator)
    if fsdp is not None:
        from trl.models.utils import prepare_fsdp

        return prepare_fsdp(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)


def _shard_frozen(model: Any, accelerator: Any) -> Any:
    """FSDP2 by accelerate, which hands weights on where only the first process has read them (TRL's own does not).

    The layers that are wrapped are the frozen model's own: it may be of another family than the trained one.
    """
    from accelerate.utils import fsdp2_prepare_model

    plugin = accelerator.state.fsdp_plugin
    accelerator.state.fsdp_plugin = copy.copy(plugin)
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = None
    try:
        return fsdp2_prepare_model(accelerator, model)
    finally:
        accelerator.state.fsdp_plugin = plugin
