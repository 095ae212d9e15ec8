"""`TargetSFTTrainer`: TRL's `SFTTrainer` with the loss of a target distribution."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer

from .. import compat
from ..cache.offline import TEACHER_COLUMNS
from ..cache.sequences import by_name
from ..data.collators import EXAMPLE, TokenColumnCollator, trajectories
from ..data.columns import prepared
from ..data.labels import report
from ..loss.fused import LabelCount
from ..loss.per_token import TOKEN_COLUMNS, PerToken, shifted_labels
from ..loss.teacher import TopKLogits
from ..model.adapters import base_model, has_virtual_tokens
from ..model.forward import forget_experts, install
from ..teachers.placement import read_in_parts
from ..teachers.remembered import Remembered
from ..theory.reference import IGNORE
from .checks import refuse_images, refuse_sharded_prompt, refuse_unknown_arguments, trusted_ids
from .config import TargetSFTConfig, as_target_config
from .first_step import FirstStep
from .kernels import Kernels
from .metrics import TokenSums, without_repeats
from .scorer import ScoredOutput, Scorer
from .second_model import choose, known_to_student, open_second_model


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
            The teacher, instead of `args.teacher_model_name_or_path`. Losses that need a reference use the teacher as
            reference; without a teacher their reference is the student before training: its base weights under PEFT,
            else a frozen copy.
        kwargs:
            All other arguments of [`~trl.SFTTrainer`], by keyword.

    Metrics, besides TRL's, in train and eval: `nll`, and four means over labelled tokens that describe the target:
    `qtarget/trust` (gamma), `qtarget/target_p_y` (Q(y)), `qtarget/moved` (1/2 ||Q - p||_1) and `qtarget/grad_mass`
    (s/2 ||Q - p||_1). The logged `loss` is the published value of the method. `qtarget/teacher_nll`, logged once, is
    the mean negative log-likelihood, in nats, of the first labels under the teacher or reference.
    `trl_qtarget.loss.per_token` lists the columns of the dataset that give numbers to tokens.

    Raises:
        ValueError: an option that the loss would not honour, or a teacher that is missing or does not fit. Mistakes
            that the arguments alone can show are refused before any data is tokenized.
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
        refuse_unknown_arguments(kwargs, POSITIONAL)
        args = as_target_config(args, model, teacher_model)
        self.target = args.target()
        choice = choose(model, teacher_model, args, self.target, kwargs)
        self._agreement = choice.agreement
        super().__init__(model, args, **kwargs)
        # False in most vision-language models: Trainer would average micro-batches of unequal lengths
        self.model_accepts_loss_kwargs = True
        compat.check_trainer(self)
        refuse_sharded_prompt(self.model, self.accelerator)
        if self._is_vision_dataset:
            refuse_images(self.model, args, choice.columns)
        else:
            self.data_collator = known_to_student(self, TokenColumnCollator(self.data_collator))
        install(base_model(self.model))
        self.target = self.target.trusting(args.trust_floor, trusted_ids(self._tokenizer, args.trust_token_ids or []))
        self._teacher, self._columns, self.data_collator = open_second_model(choice, self)
        self._kernels = Kernels(args.qtarget_backend, args.qtarget_chunk_size, self._columns)
        self._first_step = FirstStep(self)
        self._sums = TokenSums(self)
        self._evaluated = ""  # the name of the evaluation set, if there are several
        before = by_name(kwargs.get("train_dataset"), kwargs.get("eval_dataset"))
        for line in report(choice.columns, before, by_name(self.train_dataset, self.eval_dataset), args):
            self.accelerator.print(line)

    # Data

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """Prepare a dataset as SFTTrainer does, and keep the token columns beside their tokens."""
        given = (dataset, processing_class, args, packing, formatting_func, dataset_name)
        return prepared(super()._prepare_dataset, *given)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        compat.keep_columns(self, TOKEN_COLUMNS)

    # Loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum of the loss over labelled tokens, divided by the number of labelled tokens of the optimizer step."""
        mode = "train" if self.model.training else "eval"
        inputs = {**inputs, "use_cache": False}
        columns = {name: inputs.pop(name) for name in (*TOKEN_COLUMNS, *TEACHER_COLUMNS) if name in inputs}
        examples = inputs.pop(EXAMPLE, None)
        if mode == "eval":
            inputs = without_repeats(inputs, examples, self.accelerator)
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
        scorer = self._scorer(inputs, unlabelled, columns, mode)
        # the bound method: FSDP2 copies a dataclass argument and casts its tensors to half precision
        out = model(**inputs, qtarget=scorer.__call__)
        if not scorer.called:
            raise RuntimeError(
                "The loss head of trl_qtarget was not used: something has replaced the model's forward since the "
                "trainer was made, and this loss would silently not be trained."
            )
        if self.aux_loss_enabled and out.aux_loss is None:
            self.aux_loss_enabled = False
            forget_experts(base_model(self.model))
        if mode == "train":
            self._first_step.run(model, scorer, inputs, columns)
        self._sums.add(out, inputs, mode)
        loss = self._reduced(out, num_items_in_batch, mode)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**unlabelled)

    def _scorer(self, inputs: dict, unlabelled: dict, columns: dict[str, Tensor], mode: str) -> Scorer:
        """The loss of this batch, with the teacher's distribution and the columns that the target reads."""
        read = {name: column for name, column in columns.items() if self.target.reads_column(name)}
        tokens = PerToken(shifted_labels(inputs), **{name: read[name] for name in TOKEN_COLUMNS if name in read})
        if "token_weight" in self.target.needs and tokens.token_weight is None:
            raise ValueError(
                f"Loss {self.args.loss!r} reads a token_weight column, one number for each of input_ids: add it to "
                "the tokenized dataset."
            )
        if self.target.whole_batch:
            tokens = replace(tokens, trajectory=trajectories(inputs))
        scorer = Scorer(self.target, tokens, self._kernels, check=self._first_step.pending)
        if not has_virtual_tokens(self.model):  # the last virtual token predicts the first label, which `tokens` lacks
            scorer.labelled = LabelCount(tokens.labels)
        if isinstance(self._teacher, Remembered) and mode == "train":
            self._teacher.renew(self.state.global_step)
        dense = self.target.reads_logits(read)
        if dense and "teacher_ids" in read:
            scorer.teacher = TopKLogits(*(read[name] for name in TEACHER_COLUMNS))
        if self._teacher is not None and (dense or tokens.reference_log_p_y is None):
            other = read_in_parts(self._teacher, unlabelled, self.args.teacher_batch_size, self.accelerator)
            if dense:
                scorer.teacher = other
            else:
                log_p_y = self._kernels.label_log_probs(other, tokens.labels)
                scorer.tokens = replace(tokens, reference_log_p_y=log_p_y)
        return scorer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Count labels as Trainer does, and also under sequence parallelism, where a batch has shifted labels only."""
        samples, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        if tokens is None and samples and "shift_labels" in samples[0]:
            labelled: Any = sum((batch["shift_labels"] != IGNORE).sum() for batch in samples)
            tokens = self.accelerator.reduce(labelled.to(device))
        return samples, tokens

    def _reduced(self, out: ScoredOutput, num_items_in_batch: Tensor | int | None, mode: str) -> Tensor:
        """Divide by the tokens of the step as SFTTrainer does, and undo the mean that DDP takes over ranks."""
        parts = compat.summed_parts(self.accelerator) if mode == "train" else 1
        tokens = out.sums[0] if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = out.total / tokens.to(out.total.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // compat.tensor_parallel_size(self) // parts)
        if self.aux_loss_enabled:
            # the auxiliary loss is a mean over a micro-batch, where the loss above is a share of the whole step's sum
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + out.aux_loss * (self.router_aux_loss_coef / steps / parts)
        # Under sequence parallelism DeepSpeed sums gradients over the parts of a sequence, while Trainer logs the mean
        # of the parts' losses. So the value is multiplied by the number of parts, and the gradient is not.
        return loss if parts == 1 else loss + (parts - 1) * loss.detach()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # before Trainer's own files: a kill in between leaves a checkpoint without a trainer state, which none resumes
        if isinstance(self._teacher, Remembered) and self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            self._teacher.save(folder)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if isinstance(self._teacher, Remembered):
            self._teacher.load(Path(resume_from_checkpoint))

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Evaluate as Trainer does; with several sets each metric carries its set's name, as the loss does."""
        self._evaluated = metric_key_prefix.removeprefix("eval").removeprefix("_")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        self._sums.flush(mode, self._evaluated if mode == "eval" else "")
        super().log(logs, start_time)
