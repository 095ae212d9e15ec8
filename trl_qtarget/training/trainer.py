"""`TargetSFTTrainer`: TRL's `SFTTrainer` with the loss of a target distribution."""

from __future__ import annotations

import copy
import inspect
import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer

from .. import compat
from ..cache.offline import TEACHER_COLUMNS, CachedTeacherCollator, open_cache
from ..cache.sequences import by_name
from ..data.collators import TokenColumnCollator, trajectories
from ..data.columns import TOKEN_COLUMNS, prepared, token_columns
from ..data.known_ids import KnownIds
from ..loss.fused import LabelCount
from ..loss.per_token import shifted
from ..loss.teacher import ProjectedLogits, TopKLogits
from ..model.adapters import base_model, has_virtual_tokens
from ..model.forward import install
from ..model.head import head_rows
from ..teachers.loading import copy_of_initial, load_teacher
from ..teachers.models import FrozenModel, Remembered, evaluating, within_student
from ..teachers.placement import read_in_parts
from ..teachers.vocab import Agreement, common_columns
from ..theory.reference import IGNORE
from ..theory.target import Target
from .checks import (
    compare_tokenizers,
    mean_nll,
    refuse,
    refuse_images,
    refuse_model,
    refuse_placement,
    refuse_sharded_prompt,
    trusted_ids,
)
from .config import TargetSFTConfig, as_target_config
from .metrics import TokenSums
from .scorer import ScoredOutput, Scorer
from .self_check import check_head


POSITIONAL = list(inspect.signature(SFTTrainer.__init__).parameters)[3:]  # after self, model, args


class TargetSFTTrainer(SFTTrainer):
    """
    Trainer for supervised fine-tuning towards a target distribution.

    It takes whatever [`~trl.SFTTrainer`] takes, and a teacher. A plain [`~trl.SFTConfig`] trains with its own
    `loss_type` ("nll" or "dft"), or with "target_sft" where a teacher is given.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or `PeftModel`):
            The student.
        args ([`TargetSFTConfig`], *optional*):
            Configuration. If `None`, the default one, whose loss is "target_sft".
        teacher_model ([`~transformers.PreTrainedModel`] or `str`, *optional*):
            The teacher, instead of `args.teacher_model_name_or_path`. Losses that need a reference take it for one;
            without it their reference is the student before training: its base weights under PEFT, else a frozen copy.
        kwargs:
            All other arguments of [`~trl.SFTTrainer`], by keyword.

    Metrics, besides TRL's, in train and eval: `nll`, and means over labelled tokens of what the target does:
    `qtarget/trust` (gamma), `qtarget/target_p_y` (Q(y)), `qtarget/moved` (1/2 ||Q - p||_1) and `qtarget/grad_mass`
    (s/2 ||Q - p||_1). The logged `loss` is the published value of the method. `qtarget/teacher_nll`, logged once, is
    what the first labels cost the teacher or reference. Columns of the dataset that give numbers to tokens are listed
    in `trl_qtarget.data`.

    Raises:
        ValueError: an option that the loss would not honour, or a teacher that is missing or does not fit; before any
            data is tokenized where it can be known by then.
    """

    args: TargetSFTConfig
    model: Any

    _tag_names = ["trl", "sft", "target-sft"]  # noqa: RUF012, as in TRL
    _name = "Target-SFT"
    _paper = {  # noqa: RUF012
        "title": "A Unifying Lens on Supervised Fine-Tuning Through Target Distribution Design",
        "id": "2606.11189",
        "citation": textwrap.dedent("""\
            @article{xie2026unifying,
                title  = {{A Unifying Lens on Supervised Fine-Tuning Through Target Distribution Design}},
                author = {Xie and others},
                year   = 2026,
                eprint = {arXiv:2606.11189},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: TargetSFTConfig | SFTConfig | TrainingArguments | None = None,
        *positional: Any,
        teacher_model: PreTrainedModel | str | None = None,
        **kwargs: Any,
    ):
        compat.warn_if_outside()
        compat.check_names()
        kwargs |= dict(zip(POSITIONAL, positional, strict=False))
        args = as_target_config(args, model, teacher_model)
        self.target = args.target()
        if teacher_model is not None and args.teacher_cache is not None:
            raise ValueError("teacher_model and teacher_cache are both given: leave one of them out.")
        teacher_model = teacher_model or (None if args.teacher_cache else args.teacher_model_name_or_path)
        refuse(args, self.target, teacher_model or args.teacher_ema_decay, kwargs)
        refuse_placement(args, self.target)
        refuse_model(model, teacher_model, args, kwargs.get("peft_config"))
        self._agreement: Agreement | None = None
        self._given = token_columns(kwargs.get("train_dataset"), kwargs.get("eval_dataset"))
        if teacher_model is not None and self._needs_model():
            rows = kwargs.get("train_dataset") or ()
            self._agreement = compare_tokenizers(model, teacher_model, kwargs.get("processing_class"), args, rows)
        if teacher_model is model and not isinstance(model, str):
            teacher_model = copy.deepcopy(model)  # freezing the teacher must not freeze the student
        reference = None
        elsewhere = teacher_model or args.teacher_ema_decay or args.teacher_cache
        if elsewhere is None and self._needs_model():
            reference = copy_of_initial(model, args, kwargs.get("peft_config"))
        super().__init__(model, args, **kwargs)
        # most vision-language models say no, and Trainer would take a mean over micro-batches of unequal lengths
        self.model_accepts_loss_kwargs = True
        compat.check_trainer(self)
        refuse_sharded_prompt(self.model, self.accelerator)
        if self._is_vision_dataset:
            refuse_images(self.model, args)
        if not self._is_vision_dataset:
            self.data_collator = TokenColumnCollator(self.data_collator)
        elif self._given:
            raise ValueError(f"The column {self._given[0]} is not read beside images: leave it out.")
        install(base_model(self.model))
        self.target = self.target.trusting(args.trust_floor, trusted_ids(self._tokenizer, args.trust_token_ids or []))
        self._columns: int | None = None
        self._teacher = self._make_teacher(teacher_model, reference)
        if args.teacher_cache is not None and self._needs_model():
            self._use_cache()
        self._introduced = False
        self._checked = not args.qtarget_self_check
        self._sums = TokenSums(self)

    # Teachers

    def _needs_model(self) -> bool:
        return self.target.reads_model(self._given)

    def _make_teacher(self, teacher: Any, reference: Any) -> Any:
        if (not self._needs_model() or self.args.teacher_cache) and "snapshot" not in self.target.needs:
            return None
        if reference is not None:
            return FrozenModel(reference, self.accelerator, self.args.teacher_offload)
        inside = within_student(self.model, teacher, self.target, self.args, self.accelerator)
        if inside is not None:
            return inside
        if isinstance(teacher, str):
            teacher = load_teacher(teacher, self.args)
        if self._is_vision_dataset:
            refuse_images(teacher, self.args)
        self._columns = self._common_columns(teacher)
        return FrozenModel(teacher, self.accelerator, self.args.teacher_offload)

    def _use_cache(self) -> None:
        if self._is_vision_dataset:
            raise ValueError("A teacher cache holds sequences of text: for images pass teacher_model_name_or_path.")
        columns = head_rows(base_model(self.model))
        cache = open_cache(self.args, self._tokenizer, columns, by_name(self.train_dataset, self.eval_dataset))
        made = cache.settings
        self.accelerator.print(f"Teacher: {made.teacher}, {made.k} ids a label from {len(cache)} cached sequences")
        self._columns = made.vocab_size if made.vocab_size < columns else None
        self.data_collator = CachedTeacherCollator(self.data_collator, cache)

    def _common_columns(self, teacher: Any) -> int | None:
        """Over how many first ids the two are compared, with all data held to them; None for every row of both."""
        ours, theirs = (head_rows(m) for m in (base_model(self.model), teacher))
        columns, report = common_columns(self._agreement, len(self._tokenizer), ours, theirs)
        self.accelerator.print(report)
        if columns is not None:
            known = KnownIds(self.data_collator, {"labels": columns, "input_ids": theirs}, self._tokenizer)
            known.scan("train", self.train_dataset)
            known.scan("eval", self.eval_dataset)
            self.data_collator = known
        return columns

    # Data

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """As SFTTrainer prepares it, with the token columns beside their tokens."""
        given = (dataset, processing_class, args, packing, formatting_func, dataset_name)
        return prepared(super()._prepare_dataset, *given)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *TOKEN_COLUMNS]))

    # Loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum of the loss over labelled tokens, over the number of them in the whole optimizer step."""
        mode = "train" if self.model.training else "eval"
        inputs = {**inputs, "use_cache": False}
        columns = {name: inputs.pop(name) for name in (*TOKEN_COLUMNS, *TEACHER_COLUMNS) if name in inputs}
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        plain = {name: value for name, value in inputs.items() if name != "labels"}
        scorer = self._scorer(inputs, plain, columns, mode)
        # a bound method, as FSDP2 would call a copy of a dataclass, with its numbers cast to half precision
        out = model(**inputs, qtarget=scorer.__call__)
        if not scorer.called:
            raise RuntimeError(
                "The loss head of trl_qtarget was not used: something has replaced the model's forward since the "
                "trainer was made, and this loss would silently not be trained."
            )
        if not self._checked and mode == "train" and not self._is_vision_dataset:
            with evaluating(self.model):
                check_head(model, inputs["input_ids"], half=self.args.bf16 or self.args.fp16)
        self._checked = self._checked or mode == "train"
        if not self._introduced and mode == "train":
            self._introduce_teacher(scorer, inputs, columns)
        self._sums.add(out, inputs, mode)
        loss = self._reduced(out, num_items_in_batch, mode)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**plain)

    def _scorer(self, inputs: dict, plain: dict, columns: dict[str, Tensor], mode: str) -> Scorer:
        """The loss of this batch: what the teacher sees of it, and what is known of its tokens."""
        scorer = Scorer(self.target, self.args.qtarget_backend, self.args.qtarget_chunk_size, self._columns)
        scorer.check = not self._checked
        if "shift_labels" not in inputs and not has_virtual_tokens(self.model):  # these predict the very first label
            scorer.labelled = LabelCount(inputs["labels"][:, 1:])
        read = {name: x for name, x in columns.items() if self.target.reads_column(name)}
        for name in read.keys() & set(TOKEN_COLUMNS):
            setattr(scorer, name, read[name])
        if "token_weight" in self.target.needs and scorer.token_weight is None:
            raise ValueError(
                f"Loss {self.args.loss!r} reads a token_weight column, one number for each of input_ids: add it to "
                "the tokenized dataset."
            )
        if self.target.whole_batch:
            scorer.trajectory = trajectories(inputs)
        if isinstance(self._teacher, Remembered) and mode == "train":
            self._teacher.renew(self.state.global_step)
        dense = self.target.reads_logits(read)
        if dense and "teacher_ids" in read:
            scorer.teacher = TopKLogits(*(read[name] for name in TEACHER_COLUMNS))
        if self._teacher is not None and (dense or scorer.reference_log_p_y is None):
            other = read_in_parts(self._teacher, plain, self.args.teacher_batch_size, self.accelerator)
            if dense:
                scorer.teacher = other
            else:
                scorer.reference_log_p_y = self._log_p_y(other, inputs["labels"])
        return scorer

    def _log_p_y(self, other: ProjectedLogits, labels: Tensor) -> Tensor:  # (B, T)
        """log-probability of each label under another model."""
        with torch.no_grad():
            reader = Scorer(Target(), self.args.qtarget_backend, self.args.qtarget_chunk_size, self._columns)
            return reader.log_p_y(other, shifted(labels, fill=IGNORE))

    def _introduce_teacher(self, scorer: Scorer, inputs: dict[str, Any], columns: dict[str, Tensor]) -> None:
        """Log once what the labels cost the other model, so that a broken one is seen at once."""
        self._introduced = True
        log_p_y = scorer.reference_log_p_y
        if isinstance(scorer.teacher, ProjectedLogits):
            log_p_y = self._log_p_y(scorer.teacher, inputs["labels"])
        elif scorer.teacher is not None:
            log_p_y = columns["reference_log_p_y"]
        if log_p_y is not None:
            labels = shifted(inputs["labels"], fill=IGNORE)
            nll = mean_nll(log_p_y, labels, self.accelerator, len(self._tokenizer))
            self._metrics["train"]["qtarget/teacher_nll"].append(nll)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """As Trainer, counting labels also where ranks hold parts of a sequence, with its labels shifted."""
        samples, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        if tokens is None and samples and "shift_labels" in samples[0]:
            labelled: Any = sum((batch["shift_labels"] != IGNORE).sum() for batch in samples)
            tokens = self.accelerator.reduce(labelled.to(device))
        return samples, tokens

    def _reduced(self, out: ScoredOutput, num_items_in_batch: Tensor | int | None, mode: str) -> Tensor:
        """As SFTTrainer reduces: over all tokens of the step, undoing the mean that DDP takes over ranks."""
        parts = compat.summed_parts(self.accelerator) if mode == "train" else 1
        tokens = out.sums[0] if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = out.total / tokens.to(out.total.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // compat.tensor_parallel_size(self) // parts)
        if self.aux_loss_enabled:
            # a mean of its own for each micro-batch, where the loss above is a share of the whole step's
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + out.aux_loss * (self.router_aux_loss_coef / steps / parts)
        # Where gradients are summed over the parts of a sequence, what Trainer logs is still the mean of their values.
        # Trainer's own reduction, a differentiable gather, would make such gradients too large by their number.
        return loss if parts == 1 else loss + (parts - 1) * loss.detach()

    # Checkpoints: what a student remembers of itself is part of the run

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if isinstance(self._teacher, Remembered) and self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self._teacher.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if isinstance(self._teacher, Remembered):
            self._teacher.load(Path(resume_from_checkpoint))

    # Metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        self._sums.flush(mode)
        super().log(logs, start_time)
