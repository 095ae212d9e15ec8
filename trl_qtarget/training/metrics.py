"""Metrics of a run: sums over the tokens of all batches and ranks, and their means as `SFTTrainer.log` reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import compat
from .scorer import SUMS, ScoredOutput


METRICS = {"nll": "nll", **{f"qtarget/{name}": name for name in ("trust", "moved", "target_p_y", "grad_mass")}}
TRL_METRICS = {"entropy": "entropy", "mean_token_accuracy": "top1"}


class TokenSums:
    """Sums of the batches since the last log, for training and for evaluation."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.sums: dict[str, list[Tensor]] = {"train": [], "eval": []}

    def add(self, out: ScoredOutput, inputs: dict[str, Any], mode: str) -> None:
        """Add the sums of one batch, reduced over ranks; the host does not wait for the device before `flush`."""
        seen = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        aux = out.aux_loss.detach() if self.trainer.aux_loss_enabled else 0.0
        extra = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=out.sums.device) for x in (seen, aux)])
        reduced: Any = self.trainer.accelerator.reduce(torch.cat([out.sums.detach(), extra]), reduction="sum")
        self.sums[mode].append(reduced)

    def flush(self, mode: str) -> None:
        """Write the means since the last log into the trainer's metrics, and start again from zero."""
        trainer = self.trainer
        if not self.sums[mode]:
            return
        table = torch.stack(self.sums[mode]).double().cpu()
        self.sums[mode].clear()
        columns: dict[str, Tensor] = dict(zip((*SUMS, "seen", "aux_loss"), table.unbind(-1), strict=True))
        metrics, tokens = trainer._metrics[mode], columns["tokens"]
        for name, column in METRICS.items():
            metrics[name] = [(columns[column].sum() / tokens.sum().clamp(min=1)).item()]
        for name, column in TRL_METRICS.items():  # TRL's definition: the mean over batches of each batch's mean
            metrics[name] = [(columns[column] / tokens.clamp(min=1)).mean().item()]
        if mode == "train":
            trainer._total_train_tokens += int(columns["seen"].sum()) // compat.tensor_parallel_size(trainer)
        metrics["num_tokens"] = [trainer._total_train_tokens]
        if trainer.aux_loss_enabled:
            metrics["aux_loss"] = [columns["aux_loss"].mean().item() / trainer.accelerator.num_processes]
