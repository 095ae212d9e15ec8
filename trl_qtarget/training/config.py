"""`TargetSFTConfig`: TRL's `SFTConfig` with the options of the target distribution, the teacher and the kernels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from ..compat import split_warmup
from ..loss.backends import BACKENDS
from ..theory.presets import build, name_of
from ..theory.target import Target


@dataclass
class TargetSFTConfig(SFTConfig):
    r"""
    Configuration class for the [`TargetSFTTrainer`].

    It has every parameter of [`~trl.SFTConfig`] and the following.

    Parameters:
        > Parameters that control the target distribution

        loss (`str`, *optional*, defaults to `"target_sft"`):
            Name of the loss: a preset, as `trl-qtarget losses` lists them, or one of your own as
            `"my_module:my_loss"` or `"my_losses.py:my_loss"`. In Python also a function that returns a `Target`, or a
            `Target`. TRL's `loss_type` stays at its default.
        loss_kwargs (`dict[str, Any]` or `str`, *optional*):
            Arguments of the loss, for example `{"eta": 0.25}`. Defaults are the published ones.
        trust_floor (`float`, *optional*, defaults to `0.0`):
            Least trust that any label gets, in `[0, 1]`. Losses that weight labels by their probability never learn
            labels that the model finds impossible; with a small floor they do.
        trust_token_ids (`list[str]`, *optional*):
            Labels that are trusted fully: token ids, tokens, or `"special"` for the end-of-sequence and other special
            tokens. Without this option a base model may never learn to stop under such losses.

        > Parameters that control the teacher

        teacher_model_name_or_path (`str`, *optional*):
            Hub id or folder of the teacher, which must share the student's tokenizer. For losses that need a reference
            the teacher replaces the initial model. If student and teacher are adapters of one base model, that model
            is loaded once.
        teacher_model_revision (`str`, *optional*):
            Branch, tag or commit of the teacher.
        teacher_model_init_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments for the teacher's `from_pretrained`, for example `{"dtype": "bfloat16"}`.
        teacher_cache (`str`, *optional*):
            Folder or Hub dataset that `trl-qtarget cache` made from these rows. It replaces the teacher, which is then
            not loaded.
        teacher_ema_decay (`float`, *optional*):
            Decay of an exponential moving average of the student over its updates, for example `0.999`. The average is
            then the teacher.
        teacher_offload (`bool`, *optional*, defaults to `False`):
            Whether the teacher's weights stay in host memory and are on the device for its forward pass only. Not
            for a teacher that shares the student's weights, nor with FSDP or ZeRO-3, which shard the teacher.
        teacher_batch_size (`int`, *optional*):
            Rows of a micro-batch that the teacher reads at once; if `None`, all. Results do not depend on it. Not with
            padding-free batches or packing other than "wrapped", whose rows are joined into one, nor with images.

        > Parameters that control the computation

        qtarget_backend (`str`, *optional*, defaults to `"auto"`):
            Kernels of the loss: `"auto"`, `"triton"` or `"torch"`.
        qtarget_chunk_size (`int`, *optional*):
            Tokens whose logits are in memory at once. If `None`, a budget of bytes decides. Results do not depend on
            it.
        qtarget_self_check (`bool`, *optional*, defaults to `True`):
            Whether the first training step compares the fused loss of a few tokens with the float64 specification,
            and stops on a difference.

        > Parameters whose default is TRL's

        warmup_steps (`int` or `float`, *optional*, defaults to `0`):
            Updates over which the learning rate rises from 0; below 1, that fraction of all updates. Older releases of
            transformers take whole numbers only.
    """

    loss: str = field(
        default="target_sft",
        metadata={
            "help": "Name of the loss: a preset as listed by `trl-qtarget losses`, or your own as `my_module:my_loss` "
            "or `my_losses.py:my_loss`."
        },
    )
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of the loss, e.g. '{\"eta\": 0.25}'. Defaults are the published ones."},
    )
    trust_floor: float = field(
        default=0.0,
        metadata={"help": "Least trust that any label gets, between 0 and 1."},
    )
    trust_token_ids: list[str] | None = field(
        default=None,
        metadata={"help": "Labels that are trusted fully: token ids, tokens, or `special` for all special tokens."},
    )
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of the teacher. It must share the student's tokenizer."},
    )
    teacher_model_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of the teacher."},
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Keyword arguments for the teacher\'s `from_pretrained`, e.g. \'{"dtype": "bfloat16"}\'.'},
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub dataset made by `trl-qtarget cache`; the teacher is then not loaded."},
    )
    teacher_ema_decay: float | None = field(
        default=None,
        metadata={"help": "Decay of a moving average of the student, which is then the teacher, e.g. 0.999."},
    )
    teacher_offload: bool = field(
        default=False,
        metadata={"help": "Whether the teacher's weights are on the device for its forward pass only."},
    )
    teacher_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows of a micro-batch that the teacher reads at once. If not set, all of them."},
    )
    qtarget_backend: str = field(
        default="auto",
        metadata={"help": "Kernels of the loss: `auto`, `triton` or `torch`."},
    )
    qtarget_chunk_size: int | None = field(
        default=None,
        metadata={"help": "Tokens whose logits are in memory at once. If not set, a budget of bytes decides."},
    )
    qtarget_self_check: bool = field(
        default=True,
        metadata={"help": "Whether the first step compares a few tokens with the float64 specification."},
    )

    warmup_steps: float = field(
        default=0,
        metadata={"help": "Updates over which the learning rate rises; below 1, that fraction of all updates."},
    )

    def __post_init__(self):
        self.loss = name_of(self.loss)
        split_warmup(self)
        for name in ("loss_kwargs", "teacher_model_init_kwargs"):
            setattr(self, name, as_mapping(name, getattr(self, name)))
        super().__post_init__()
        self.target()
        self._check_what_would_be_ignored()
        if not 0 <= self.trust_floor <= 1:
            raise ValueError(f"trust_floor must be between 0 and 1, got {self.trust_floor}.")
        if self.teacher_ema_decay is not None and not 0 < self.teacher_ema_decay < 1:
            raise ValueError(f"teacher_ema_decay must lie between 0 and 1, got {self.teacher_ema_decay}.")
        if self.qtarget_backend not in BACKENDS:
            raise ValueError(f"qtarget_backend must be one of {', '.join(BACKENDS)}, got {self.qtarget_backend!r}.")
        for name, unit in (("qtarget_chunk_size", "token"), ("teacher_batch_size", "row")):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 {unit}, got {getattr(self, name)}.")
        if isinstance(self.trust_token_ids, str | int):
            self.trust_token_ids = [str(self.trust_token_ids)]

    def target(self) -> Target:
        """The `Target` that `loss` and `loss_kwargs` name.

        Raises:
            ValueError: an unknown loss or a bad argument.
        """
        kwargs: Any = self.loss_kwargs or {}
        return build(self.loss, **kwargs)

    def _check_what_would_be_ignored(self) -> None:
        """Refuse options that SFTTrainer honours for its own losses only: here they would be dropped in silence."""
        if self.loss_type != "nll":
            raise ValueError(
                f"loss_type={self.loss_type!r} is TRL's own option and is not read here: pass --loss {self.loss_type}."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} is not read here: pass --loss label_smoothing "
                f"--loss_kwargs '{{\"lam\": {self.label_smoothing_factor}}}'."
            )
        if self.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel replaces parts of the model's forward that carry the loss: leave it unset. For "
                "Liger's layer kernels pass --model_init_kwargs '{\"use_kernels\": true}'."
            )


def as_target_config(args: Any, model: Any, teacher: Any) -> TargetSFTConfig:
    """A `TargetSFTConfig` from the trainer's `args`: the same one, the default for None, or one with TRL's settings.

    A plain `SFTConfig` keeps its `loss_type` as the loss, or gets "target_sft" if a teacher is given.
    """
    if isinstance(args, TargetSFTConfig):
        other = teacher or args.teacher_model_name_or_path or args.teacher_cache
        if args.teacher_ema_decay is not None and other is not None:
            raise ValueError(
                "teacher_ema_decay makes the student its own teacher, and another teacher is given: leave one of the "
                "two out."
            )
        return args
    if args is None:
        name = model if isinstance(model, str) else model.config.name_or_path
        return TargetSFTConfig(f"{name.rstrip('/').split('/')[-1]}-TargetSFT")
    given = args.to_dict()
    given |= {name: getattr(args, name) for name in given if name.endswith("_token")}  # to_dict masks tokens
    published = given.pop("loss_type", "nll")
    return TargetSFTConfig(**given, loss=published if teacher is None else "target_sft")


def as_mapping(name: str, value: Any) -> dict[str, Any] | None:
    """An option that holds a mapping, given as a dict, or as JSON text on the command line."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"{name} must be JSON such as '{{\"key\": 1}}', got {value!r}.") from None
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a mapping, got {value!r}.")
    return None if value is None else dict(value)
