"""Whole training steps of `TargetSFTTrainer` beside TRL's own trainers, on a real model and the same batches.

    python recipes/smollm2-135m/prepare.py
    python -m benchmarks.train

A step is forward, backward and AdamW. Trainers take turns on the same batch, so that a slow spell of the machine falls
on all; the table shows medians of the ratios within a turn. Peak memory is that of a separate process, above the
memory that it holds before its first step (weights, data, teacher).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from rich.table import Table

from benchmarks.kernel import console
from benchmarks.machine import forget_peak, provenance, resident, save
from trl_qtarget.training import scorer


ROOT = Path("runs/smollm2-135m")
SHAPE = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "max_length": 512}
TRAINERS = ["TRL nll", "TRL dft", "TRL distillation", "nll", "dft", "asft", "target_sft", "target_sft cached"]


def make(name: str, args: argparse.Namespace, out: str) -> Any:
    """A trainer that could start now."""
    from trl import SFTConfig, SFTTrainer

    from trl_qtarget import TargetSFTConfig, TargetSFTTrainer

    data = load_dataset("json", data_files=str(args.data), split="train").select(range(args.rows * 8))
    shape = {**SHAPE, "output_dir": out, "per_device_train_batch_size": args.rows, "learning_rate": 1e-6}
    if name == "TRL distillation":
        return distillation(args, shape, data)
    if name.startswith("TRL "):
        return SFTTrainer(str(args.model), SFTConfig(**shape, loss_type=name.split()[1]), train_dataset=data)
    teachers = {"target_sft": {"teacher_model_name_or_path": str(args.teacher)}}
    teachers["target_sft cached"] = {"teacher_cache": str(args.cache)}
    loss = name.partition(" ")[0]
    config = TargetSFTConfig(**shape, loss=loss, qtarget_self_check=False, **teachers.get(name, {}))
    return TargetSFTTrainer(str(args.model), config, train_dataset=data)


def distillation(args: argparse.Namespace, shape: dict, data: Any) -> Any:
    """TRL's forward KL to a teacher, given the completions of the data instead of those it would generate."""
    from trl import DistillationConfig, DistillationTrainer
    from trl.trainer.utils import pad

    class Offline(DistillationTrainer):
        def _prepare_inputs(self, generation_batch: Any) -> dict:
            ids, labels = generation_batch["input_ids"], generation_batch["labels"]
            lengths = generation_batch["attention_mask"].sum(-1).tolist()
            starts = (labels != -100).int().argmax(-1).tolist()
            prompts = [row[:start] for row, start in zip(ids, starts, strict=True)]
            completions = [row[start:end] for row, start, end in zip(ids, starts, lengths, strict=True)]
            masks = [[torch.ones_like(x) for x in part] for part in (prompts, completions)]
            return {
                "prompt_ids": pad(prompts, self._tokenizer.pad_token_id, padding_side="left"),
                "prompt_mask": pad(masks[0], 0, padding_side="left"),
                "completion_ids": pad(completions, self._tokenizer.pad_token_id),
                "completion_mask": pad(masks[1], 0),
            }

    shape = {name: value for name, value in shape.items() if name != "max_length"}
    config = DistillationConfig(**shape, beta=0.0)
    return Offline(str(args.model), str(args.teacher), args=config, train_dataset=data.select_columns("prompt"))


def stepper(trainer: Any) -> Callable[[dict], None]:
    """One training step on a batch."""
    trainer.model.train()
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1

    def step(batch: dict) -> None:
        tokens = (batch["labels"][:, 1:] != -100).sum()
        trainer.training_step(trainer.model, dict(batch), num_items_in_batch=tokens)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def measure(args: argparse.Namespace) -> float:
    """Peak MiB of a few steps of one trainer."""
    with tempfile.TemporaryDirectory() as out:
        trainer = make(args.measure, args, out)
        # the distillation trainer collates prompts only
        source = make("TRL nll", args, out) if args.measure == "TRL distillation" else trainer
        step, batches = stepper(trainer), list(islice(collated(source), 2))
        del source
        gc.collect()
        forget_peak()
        before = resident("VmRSS")
        for batch in batches:
            step(batch)
        return (resident("VmHWM") - before) / 2**10


def peak(name: str, args: argparse.Namespace) -> float:
    words = [w for k in ("model", "teacher", "cache", "data", "rows") for w in (f"--{k}", getattr(args, k))]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.train", "--measure", name, *map(str, words)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(run.stdout.split()[-1])


def collated(trainer: Any) -> Iterator[dict]:
    """The batches of one pass, in the order of the data, so that all trainers get the same."""
    size = trainer.args.per_device_train_batch_size
    for start in range(0, len(trainer.train_dataset), size):
        yield trainer.data_collator([trainer.train_dataset[i] for i in range(start, start + size)])


class HeadClock:
    """Measures the seconds in `qtarget_loss`, which does the head's work: its backward pass is one multiplication."""

    def __init__(self) -> None:
        self.seconds, self.loss, scorer.qtarget_loss = 0.0, scorer.qtarget_loss, self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        out = self.loss(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return out


def compare(args: argparse.Namespace) -> list[dict]:
    clock = HeadClock()
    with tempfile.TemporaryDirectory() as out:
        trainers = {name: make(name, args, out) for name in args.only}
        steps = {name: stepper(trainer) for name, trainer in trainers.items()}
        batches = {name: list(collated(trainers[name if "cached" in name else args.only[0]])) for name in args.only}
        seconds: dict[str, list[float]] = {name: [] for name in args.only}
        heads: dict[str, list[float]] = {name: [] for name in args.only}
        for turn in range(args.turns + 1):
            for name, step in steps.items():
                batch = batches[name][turn % len(batches[name])]
                start, clock.seconds = time.perf_counter(), 0.0
                step(batch)
                if turn:  # the first one warms up
                    seconds[name].append(time.perf_counter() - start)
                    heads[name].append(clock.seconds / seconds[name][-1])
    base = args.only[0]
    tokens = statistics.mean(b["attention_mask"].sum().item() for b in batches[base])
    rows = []
    for name in args.only:
        ratios = [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]
        median = statistics.median(seconds[name])
        rows.append({
            "trainer": name, "rows": args.rows, "tokens": round(tokens), "seconds_a_step": round(median, 3),
            f"to_{base.replace(' ', '_')}": round(statistics.median(ratios), 3),
            "tokens_a_second": round(tokens / median),
            "share_of_head": round(statistics.median(heads[name]), 3) or "",  # TRL's has no such seam
            "peak_mib": round(peak(name, args)) if args.memory else "",
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "model")
    parser.add_argument("--teacher", type=Path, default=ROOT / "model")
    parser.add_argument("--cache", type=Path, default=ROOT / "teacher-cache", help="of benchmarks.teacher")
    parser.add_argument("--data", type=Path, default=ROOT / "train.jsonl")
    parser.add_argument("--rows", type=int, default=2, help="rows of a batch")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=TRAINERS, default=TRAINERS)
    parser.add_argument("--no_memory", dest="memory", action="store_false", help="time only")
    parser.add_argument("--measure", choices=TRAINERS, help=argparse.SUPPRESS)  # the child process of `peak`
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if not args.cache.exists():
        args.only = [name for name in args.only if "cached" not in name]
    if args.measure:
        print(measure(args))
        return
    rows = compare(args)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    facts = provenance()
    console.print(json.dumps(facts), style="dim")
    path = save("train_cpu", rows, facts)
    console.print(f"Written to {path}.")


if __name__ == "__main__":
    main()
