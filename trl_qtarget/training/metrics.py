"""Metrics of a run: sums over the tokens of all batches and ranks, and their means as `SFTTrainer.log` reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import compat
from ..theory.reference import IGNORE
from .scorer import SUMS, ScoredOutput


METRICS = {"nll": "nll", **{f"qtarget/{name}": name for name in ("trust", "moved", "target_p_y", "grad_mass")}}
UNLABELLED = 100  # batches without a label that are no chance any more
TRL_METRICS = {"entropy": "entropy", "mean_token_accuracy": "top1"}


def without_repeats(inputs: dict[str, Any], examples: Tensor | None, accelerator: Any) -> dict[str, Any]:
    """The inputs of an evaluation with the labels of repeated rows ignored.

    accelerate repeats rows of the last batch until all ranks have equally many. Sums over ranks would count these rows
    twice, and so would the loss by which the best model is chosen.

    Args:
        examples: (1, T), the row that each token of a padding-free batch comes from; None for batches of one row each.
    """
    real = compat.rows_before_repeats(accelerator)
    if real is None:
        return inputs
    masked = {}
    for name in {"labels", "shift_labels"} & inputs.keys():
        labels = inputs[name]
        rows = torch.arange(len(labels), device=labels.device)[:, None] if examples is None else examples
        masked[name] = labels.masked_fill(rows >= real, IGNORE)
    return inputs | masked


class TokenSums:
    """Sums of the batches since the last log, for training and for evaluation."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.has_trained = False  # whether any batch of the training had a label
        self.unlabelled = 0  # batches without a label since the last one with labels
        self.sums: dict[str, list[Tensor]] = {"train": [], "eval": []}

    def add(self, out: ScoredOutput, inputs: dict[str, Any], mode: str) -> None:
        """Add the sums of one batch, reduced over ranks; the host does not wait for the device before `flush`."""
        seen = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        aux = out.aux_loss.detach() if self.trainer.aux_loss_enabled else 0.0
        extra = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=out.sums.device) for x in (seen, aux)])
        reduced: Any = self.trainer.accelerator.reduce(torch.cat([out.sums.detach(), extra]), reduction="sum")
        self.sums[mode].append(reduced)

    def flush(self, mode: str, dataset: str = "") -> None:
        """Write the means since the last log into the trainer's metrics, and start again from zero.

        `dataset` names one of several evaluation sets; its metrics then carry the name, as the loss does.

        Raises:
            ValueError: no batch of the training has had a label so far.
        """
        trainer = self.trainer
        if not self.sums[mode]:
            return
        table = torch.stack(self.sums[mode]).cpu().double()
        self.sums[mode].clear()
        columns: dict[str, Tensor] = dict(zip((*SUMS, "seen", "aux_loss"), table.unbind(-1), strict=True))
        metrics, tokens = compat.metrics(trainer, mode), columns["tokens"]
        if mode == "train":
            self._count_unlabelled(tokens, metrics)
        prefix = f"{dataset}_" if dataset else ""
        for name, column in METRICS.items():
            metrics[prefix + name] = [(columns[column].sum() / tokens.sum().clamp(min=1)).item()]
        for name, column in TRL_METRICS.items():  # TRL's definition: the mean over batches of each batch's mean
            metrics[prefix + name] = [(columns[column] / tokens.clamp(min=1)).mean().item()]
        seen = int(columns["seen"].sum()) // compat.tensor_parallel_size(trainer) if mode == "train" else 0
        metrics["num_tokens"] = [compat.count_train_tokens(trainer, seen)]
        if trainer.aux_loss_enabled:
            metrics["aux_loss"] = [columns["aux_loss"].mean().item() / trainer.accelerator.num_processes]

    def _count_unlabelled(self, tokens: Tensor, metrics: dict[str, list[float]]) -> None:
        """Log how many batches had no label; stop if none of many had one, since the loss of such a training is 0.

        A few batches without labels may come first by chance: the run goes on to its end or `UNLABELLED` batches.
        """
        self.unlabelled = 0 if tokens.any() else self.unlabelled + len(tokens)
        self.has_trained = self.has_trained or bool(tokens.any())
        state = self.trainer.state
        if not self.has_trained and (self.unlabelled >= UNLABELLED or state.global_step >= state.max_steps):
            raise ValueError(
                f"None of the {self.unlabelled} batches so far has a labelled token, so nothing is trained: raise "
                "max_length if prompts are longer than it, or look at the columns that mask labels."
            )
        if (tokens == 0).any():
            metrics["qtarget/unlabelled_batches"] = [float((tokens == 0).sum())]
