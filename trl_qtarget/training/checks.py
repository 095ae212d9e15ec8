"""Checks of a trainer's arguments: refuse options that would be ignored, and combinations that cannot be right."""

from __future__ import annotations

import difflib
import inspect
import math
import warnings
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor
from transformers import AutoTokenizer

from .. import compat
from ..model.adapters import adapters_of, adapts_head, base_model, has_virtual_tokens, ties_head
from ..teachers.vocab import PROBES, Agreement, compare, texts_of
from ..theory.reference import IGNORE
from ..theory.target import Target
from .config import TargetSFTConfig


PROBED_ROWS = 3  # of the data, through both tokenizers

logger = get_logger(__name__)


def compare_tokenizers(
    model: Any, teacher: Any, processing_class: Any, args: TargetSFTConfig, rows: Iterable[Any] = ()
) -> Agreement | None:
    """Compare the tokenizers of student and teacher; None if one is not found, as for models made in memory.

    Warns of tokens that only one of the two knows.

    Raises:
        ValueError: the token ids differ, or the two split the probes or the first rows of the data differently.
    """
    names = [m if isinstance(m, str) else m.config.name_or_path for m in (model, teacher)]
    student = getattr(processing_class, "tokenizer", processing_class)
    if student is None:
        options: Any = args.model_init_kwargs or {}
        student = _tokenizer_of(names[0], options.get("revision"), args)
    taught = _tokenizer_of(names[1], args.teacher_model_revision, args)
    if names[1] and taught is None:
        warnings.warn(f"No tokenizer beside the teacher {names[1]!r}: its ids are not checked.", stacklevel=3)
    if student is None or taught is None:
        return None
    agreement = compare(student, taught, [*PROBES, *texts_of(list(islice(rows, PROBED_ROWS)), student)])
    if agreement.one_sided():
        warnings.warn(
            f"Tokens of one side: {agreement.one_sided()}. Student and teacher are compared over their "
            f"{agreement.common:,} common ids; others may not be labels, and the teacher misreads them in a prompt.",
            stacklevel=3,
        )
    return agreement


def _tokenizer_of(name: str, revision: str | None, args: TargetSFTConfig) -> Any:
    """The tokenizer in a model's folder or Hub repository, or None."""
    if not name:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError, ImportError, TypeError):  # transformers 4 raises the last two if it finds no file
        return None
    # for many models without a tokenizer transformers 5 makes one that has special tokens only
    return tokenizer if tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys() else None


def refuse_unknown_arguments(given: Iterable[str], known: Sequence[str]) -> None:
    """Raise a TypeError for an argument that the trainer does not take, with the nearest one that it does."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, ["teacher_model", *known], n=1, cutoff=0.4)
            hint = f" Did you mean {'teacher_model' if name.startswith('teacher') else close[0]}?" if close else ""
            raise TypeError(f"TargetSFTTrainer takes no argument {name!r}.{hint}")


def refuse(args: TargetSFTConfig, target: Target, teacher: Any, kwargs: dict[str, Any]) -> None:
    """Refuse arguments that would be ignored in silence, and combinations of loss and engine that cannot be right."""
    loss = args.loss
    cached = args.teacher_cache is not None
    if "teacher" in target.needs and teacher is None and not cached:
        raise ValueError(
            f"Loss {loss!r} needs a teacher: pass --teacher_model_name_or_path, --teacher_cache, or teacher_model=."
        )
    takes_model = target.reads_model()
    residual = target.residual
    if cached and residual.teacher != 0 and not residual.sums_to_one:
        raise ValueError(
            f"Loss {loss!r} has a residual whose exponents do not sum to one, so it needs all of the teacher's "
            "columns, and a cache holds the most probable ones only: pass --teacher_model_name_or_path instead."
        )
    if (teacher is not None or cached) and not takes_model:
        warnings.warn(f"Loss {loss!r} takes no teacher: the one given is not used.", stacklevel=3)
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError(
            "compute_loss_func would replace the loss. Write yours as a preset and pass --loss my_module:my_loss."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, and nn.DataParallel would score all parts of a batch "
            "with the first model. Launch with accelerate or torchrun, or set CUDA_VISIBLE_DEVICES to one GPU."
        )
    _refuse_parallelism(args, target)
    if target.whole_batch and (args.packing or args.eval_packing) and args.packing_strategy == "wrapped":
        raise ValueError(
            f"Loss {loss!r} cannot tell trajectories apart in wrapped packing: set packing_strategy to 'bfd'."
        )


def _refuse_parallelism(args: TargetSFTConfig, target: Target) -> None:
    """Refuse parallelism within a sequence or layer under which this loss would be wrong or was never tested."""
    config = compat.parallelism_config(args)
    parts = compat.sequence_parallel_size(config)
    second_model = target.reads_model() or "snapshot" in target.needs
    if parts > 1 and (second_model or target.whole_batch):
        raise ValueError(
            f"Loss {args.loss!r} cannot be trained with sequence parallelism: a second model would attend within each "
            "rank's part of the sequence only. Use a loss without teacher or reference, or sp_size=1."
        )
    if parts > 1 and not args.average_tokens_across_devices:
        raise ValueError(
            "With sequence parallelism no rank has sequences of its own to average over: leave "
            "average_tokens_across_devices at true."
        )
    for name, kind in (("cp_size", "Context"), ("tp_size", "Tensor")):
        if (getattr(config, name, None) or 1) > 1:
            raise ValueError(
                f"{kind} parallelism ({name}={getattr(config, name)}) is not verified with the losses of trl_qtarget: "
                f"set {name}=1, and shard with FSDP2 or ZeRO-3 instead."
            )


def refuse_placement(args: TargetSFTConfig, target: Target) -> None:
    """Refuse options that say how to keep or read a second model, if the run has none or cannot do so."""
    asked = [name for name in ("teacher_offload", "teacher_batch_size") if getattr(args, name)]
    second_model = target.reads_model() or "snapshot" in target.needs
    if asked and (args.teacher_cache is not None or not second_model):
        why = "teacher_cache stands for it" if second_model else f"loss {args.loss!r} has none"
        raise ValueError(f"{asked[0]} is for a teacher that is read in each step, and {why}: leave {asked[0]} out.")
    if args.teacher_offload and args.device.type == "cpu":
        raise ValueError("teacher_offload moves the teacher to the CPU, and this run is on the CPU: leave it out.")
    if args.teacher_batch_size and (args.padding_free or (args.packing and args.packing_strategy != "wrapped")):
        raise ValueError(
            "teacher_batch_size counts rows, and packing or padding_free joins the rows of a micro-batch into one: "
            "lower per_device_train_batch_size, or turn both off."
        )


def refuse_model(model: Any, teacher: Any, args: TargetSFTConfig, peft_config: Any) -> None:
    """Refuse models and adapters of which a part would not be trained, not be read, or not be placed as asked."""
    _refuse_split_model(model, args.model_init_kwargs, "The student", args)
    _refuse_split_model(teacher, args.teacher_model_init_kwargs, "The teacher", args)
    if peft_config is not None and adapts_head(peft_config, _head_names(model)):
        raise ValueError(
            "An adapter on lm_head would never be trained, since the loss multiplies by the head's own weight: remove "
            "it from target_modules, or put lm_head into modules_to_save."
        )
    for given, remedy in ((model, "train another adapter"), (teacher, "pass teacher.merge_and_unload()")):
        configs = adapters_of(given)
        if given is teacher and configs and ties_head(given):
            remedy = "pass the adapter's folder, from which it is merged into a head of its own"
        if any(adapts_head(config, _head_names(given), ties_head(given)) for config in configs):
            raise ValueError(
                f"The given PeftModel has an adapter on lm_head, which would be left out of its logits: {remedy}."
            )
    refuse_joined_rows(teacher, args)
    virtual = has_virtual_tokens(model) or getattr(peft_config, "is_prompt_learning", False)
    refuse_joined_rows(model, args, virtual)
    if virtual and compat.sequence_parallel_size(compat.parallelism_config(args)) > 1:
        raise ValueError(
            "With prompt learning each rank of a split sequence would get virtual tokens of its own: set sp_size=1, "
            "or train a LoRA."
        )
    if args.activation_offloading and args.device.type == "cpu":
        raise ValueError(
            "activation_offloading moves activations to the CPU, and this run is on the CPU: leave it out."
        )


def refuse_joined_rows(model: Any, args: TargetSFTConfig, virtual: bool = False) -> None:
    """Refuse packing and padding-free batches for a model with virtual tokens, or for one that will get them."""
    joined = args.padding_free or (args.packing and args.packing_strategy != "wrapped")
    if joined and (virtual or has_virtual_tokens(model)):
        raise ValueError(
            "With prompt learning PEFT drops position_ids, and rows joined by packing or padding_free would attend to "
            "each other: turn both off."
        )


def _refuse_split_model(model: Any, init_kwargs: Any, whose: str, args: TargetSFTConfig) -> None:
    """Refuse a device_map that spreads one model over the devices of one process, in a run of several processes."""
    if args.distributed_state.distributed_type == "NO":
        return
    device_map = (
        (init_kwargs or {}).get("device_map") if isinstance(model, str) else getattr(model, "hf_device_map", {})
    )
    if isinstance(device_map, str) or len(set((device_map or {}).values())) > 1:
        raise ValueError(
            f"{whose} has device_map={device_map!r}, which spreads it over the devices of one process, and this run "
            "has several: leave device_map out, and each gets its copy, or its shard with FSDP or ZeRO-3."
        )


def _head_names(model: Any) -> list[str]:
    """The names that a configuration of adapters may use for the output head."""
    if isinstance(model, str):
        return ["lm_head"]
    base = base_model(model)
    head = base.get_output_embeddings()
    return ["lm_head", *(name for name, module in base.named_modules() if module is head)]


def refuse_sharded_prompt(model: Any, accelerator: Any) -> None:
    """Refuse prompt learning under FSDP: PEFT would compute the virtual tokens it saves from sharded weights."""
    if has_virtual_tokens(model) and getattr(accelerator.state, "fsdp_plugin", None) is not None:
        raise ValueError(
            "With prompt learning PEFT cannot save virtual tokens that FSDP shards: train with DDP or ZeRO, or a LoRA."
        )


def refuse_images(model: Any, args: TargetSFTConfig, columns: Sequence[str] = ()) -> None:
    """Refuse a model that would not see the images of the data, and options or token columns that images rule out."""
    if columns:
        raise ValueError(f"The column {columns[0]} is not read beside images: leave it out.")
    if args.teacher_batch_size:
        raise ValueError(
            "teacher_batch_size splits a micro-batch into rows, and no common rule tells which images belong to which "
            "row: lower per_device_train_batch_size instead."
        )
    if has_virtual_tokens(model):
        raise ValueError("Prompt learning replaces the ids by which images are placed: train a LoRA instead.")
    if "pixel_values" not in inspect.signature(base_model(model).forward).parameters:
        raise ValueError(
            f"The data has images, and {type(base_model(model)).__name__} reads none: it would read their "
            "placeholders as text. Give a vision-language teacher of the student's family, or data without images."
        )


def mean_nll(log_p_y: Tensor, labels: Tensor, accelerator: Any, vocabulary: int) -> float:
    """Mean negative log-likelihood of a batch's labels under a teacher or reference, in nats, over all ranks.

    A teacher that is worse than an even guess over the vocabulary is reported in a warning.
    """
    learnt = labels != IGNORE
    nll, tokens = accelerator.reduce(torch.stack([-log_p_y[learnt].float().sum(), learnt.sum().float()])).tolist()
    mean = nll / max(tokens, 1)
    if not mean <= math.log(vocabulary) + 0.01:  # NaN too; 0.01 covers the rounding of float32 sums
        logger.warning(
            f"The teacher or reference gives the labels of the first batch {mean:.1f} nats a token, worse than an "
            f"even guess among {vocabulary} tokens: is it the right model, with the right chat template?"
        )
    return mean


def trusted_ids(tokenizer: Any, tokens: list[str]) -> list[int]:
    """The ids that `trust_token_ids` names: ids, tokens, and "special" for all special tokens of the tokenizer.

    Raises:
        ValueError: an entry is neither a token of the tokenizer nor the id of one.
    """
    ids: set[int] = set()
    for token in map(str, tokens):
        if token == "special":
            # markers such as <end_of_turn> are added as special, and no attribute of the tokenizer names them
            added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
            ids |= {*tokenizer.all_special_ids, *added}
        elif token.isdigit() and int(token) < len(tokenizer):
            ids.add(int(token))
        elif token in tokenizer.get_vocab():
            ids.add(tokenizer.convert_tokens_to_ids(token))
        else:
            raise ValueError(
                f"trust_token_ids: {token!r} is no token of this tokenizer. Give ids, tokens or 'special'."
            )
    return sorted(ids)
