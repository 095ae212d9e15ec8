"""The first training step: check the heads of both models, and log the teacher's nll of the first labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import compat
from ..loss.teacher import ProjectedLogits
from ..model.adapters import base_model
from ..model.check import head_mismatch
from ..teachers.models import evaluating
from .checks import mean_nll
from .scorer import Scorer


class FirstStep:
    """The checks and the log of a run's first training step.

    `pending` says whether the step is still to come and its numbers are to be checked (`qtarget_self_check`).
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.pending = trainer.args.qtarget_self_check
        self.done = False

    def run(self, model: Any, scorer: Scorer, inputs: dict[str, Any], columns: dict[str, Tensor]) -> None:
        """Check and log, unless an earlier batch has done so.

        Raises:
            RuntimeError: hidden states and head of the student do not give its own logits.
            ValueError: the same, of the teacher or reference.
        """
        if self.done:
            return
        if self.pending and not compat.trains_on_images(self.trainer):
            self._check_heads(model, inputs["input_ids"])
        self.pending, self.done = False, True
        self._log_teacher(scorer, columns)

    def _check_heads(self, model: Any, input_ids: Tensor) -> None:
        trainer = self.trainer
        half = trainer.args.bf16 or trainer.args.fp16
        with evaluating(trainer.model):
            mismatch = head_mismatch(model, input_ids, half)
        if mismatch is not None:
            raise RuntimeError(
                f"{type(base_model(trainer.model)).__name__} does something to its logits that trl_qtarget does not "
                f"know of: {mismatch}. Train it with TRL's SFTTrainer, and please report the model's name."
            )
        if trainer._teacher is not None:
            trainer._teacher.check(input_ids, half)

    def _log_teacher(self, scorer: Scorer, columns: dict[str, Tensor]) -> None:
        """Log the nll of the labels under the teacher or reference once, so that a broken one shows at once."""
        trainer, log_p_y = self.trainer, scorer.tokens.reference_log_p_y
        if isinstance(scorer.teacher, ProjectedLogits):
            log_p_y = trainer._kernels.label_log_probs(scorer.teacher, scorer.tokens.labels)
        elif scorer.teacher is not None:
            log_p_y = columns["reference_log_p_y"]
        if log_p_y is not None:
            nll = mean_nll(log_p_y, scorer.tokens.labels, trainer.accelerator, len(compat.tokenizer(trainer)))
            compat.metrics(trainer, "train")["qtarget/teacher_nll"].append(nll)
