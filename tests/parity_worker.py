"""Train all cells of one engine in one launch: `python parity_worker.py ENGINE FOLDER`, or under torch's launcher.

Reads the cells' names from FOLDER/ENGINE.json, finds models in FOLDER/models, and leaves in FOLDER/CELL what was
logged (steps.json) and the model as it is saved, or what stopped the training (error.txt).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import conftest
import parity
import torch
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from datasets import Dataset
from parity import BATCH, CASES, ENGINES, SAVE_EVERY, STEPS, Cell
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_qtarget import TargetSFTConfig, TargetSFTTrainer


SDPA = ALL_ATTENTION_FUNCTIONS["sdpa"]


def tokenized(labelled: slice = slice(None), weights: list[float] | None = None) -> list[dict]:
    """Eight rows as token ids; those outside `labelled` have a label that nothing predicts, their first.

    Rows without any are dropped when the data is prepared.
    """
    tokenizer = conftest.make_tokenizer()
    rows = []
    for i, row in enumerate(conftest.make_rows(BATCH)):
        prompt, answer = (tokenizer(row[part])["input_ids"] for part in ("prompt", "completion"))
        ids = prompt + answer
        labels = [-100] * len(prompt) + answer
        if i not in range(*labelled.indices(BATCH)):
            labels = [ids[0]] + [-100] * (len(ids) - 1)
        rows.append({"input_ids": ids, "labels": labels})
        if weights is not None:
            rows[-1]["token_weight"] = [weights[i]] * len(ids)
    return rows


def rank_weights() -> list[float]:
    """Weights of eight rows for which the mean over all tokens is the mean of two ranks' means over four rows each."""
    counts = [sum(y != -100 for y in row["labels"]) for row in tokenized()]
    halves = (sum(counts[:4]), sum(counts[4:]))
    return [sum(halves) / (2 * half) for half in halves for _ in range(4)]


def numbered() -> list[dict]:
    """Rows with a number each, which rides along as one for each token."""
    return [
        {**row, "token_weight": i % 3 / 2, "trust": 0.5 if i % 4 else None}
        for i, row in enumerate(conftest.make_rows(BATCH * STEPS))
    ]


ROWS = {
    "uneven": lambda: conftest.make_rows(BATCH * STEPS),
    "numbered": numbered,
    "one batch": lambda: conftest.make_rows(BATCH),  # six times
    "half unlabelled": lambda: tokenized(labelled=slice(4)),
    "tokenized": tokenized,
    "weighted as ranks": lambda: tokenized(weights=rank_weights()),
}
QUIET = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True,
    "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
    "max_steps": STEPS, "ddp_timeout": 120,
}  # fmt: skip


def in_halves() -> dict[str, Any]:
    """Options that give each of two processes half of every sequence; their batches are joined, so of one length."""
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import DeepSpeedSequenceParallelConfig

    handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
    parallelism = ParallelismConfig(sp_backend="deepspeed", sp_size=2, sp_handler=handler)
    return {"parallelism_config": parallelism, "pad_to_multiple_of": 64}


def zero_config(stage: int) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": stage == 3},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def make_trainer(cell: Cell, folder: Path, models: Path, **options: Any) -> TargetSFTTrainer:
    """The trainer of a cell, with models from their folders as a user's would have them."""
    engine, case = ENGINES[cell.engine], CASES[cell.case]
    options = {**cell.shared, **cell.options, **options}
    processes, steps = 1 if engine.split else engine.processes, options.get("gradient_accumulation_steps", 1)
    options.setdefault("per_device_train_batch_size", BATCH // processes // steps)
    if engine.zero is not None:
        options["deepspeed"] = zero_config(engine.zero)
    if engine.split:
        options |= in_halves()
        options["deepspeed"]["sequence_parallel_size"] = engine.processes
    if cell.cached:
        options["teacher_cache"] = str(models / f"{cell.case} cache")
    args = TargetSFTConfig(output_dir=str(folder), loss=cell.loss, **{**QUIET, **options})
    taught: Any = None
    if "teacher" in args.target().needs and not (cell.cached or args.teacher_ema_decay):
        taught = case.teacher() if cell.in_memory else str(models / f"{cell.case} teacher")
    data = Dataset.from_list(ROWS[cell.rows]() if case.rows is None else case.rows())
    return TargetSFTTrainer(
        case.student() if cell.in_memory else str(models / cell.case),
        args,
        train_dataset=data.to_iterable_dataset() if cell.stream else data,
        eval_dataset=data.select(range(BATCH)) if "eval_strategy" in options else None,
        processing_class=case.processor(),
        peft_config=case.peft() if case.peft else None,
        teacher_model=taught,
    )


def train(cell: Cell, folder: Path, models: Path) -> None:
    """Train a cell and leave steps.json and its model in `folder`; one that is to be killed, resume if it was."""
    saving = {"save_strategy": "steps", "save_steps": SAVE_EVERY} if cell.killed else {}
    trainer = make_trainer(cell, folder, models, **saving)
    resumed = cell.killed and any(folder.glob("checkpoint-*"))
    if cell.killed and not resumed:
        trainer.add_callback(Killer(cell.killed_before))
    trainer.train(resume_from_checkpoint=resumed or None)
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        (folder / "steps.json").write_text(json.dumps(steps))


class Killer(TrainerCallback):
    """kill -9 of every process, before a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            PartialState().wait_for_everyone()  # nobody is still writing a checkpoint
            os.kill(os.getpid(), signal.SIGKILL)


def forget() -> None:
    """Take back what a training leaves in the process, so that the next one starts as the first."""
    unset_hf_deepspeed_config()
    if parallel_state := sys.modules.get("deepspeed.runtime.sequence_parallel.parallel_state_sp"):
        parallel_state._release_sequence_parallel_groups()
        ALL_ATTENTION_FUNCTIONS["sdpa"] = SDPA  # DeepSpeed has wrapped it
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()


def pretend_to_have_gpus() -> None:
    """Accelerate knows FSDP on accelerators only; on the CPU it would fall back to DDP in silence."""
    own = PartialState.__init__

    def init(self, *args, **kwargs):
        own(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def main() -> None:
    name, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    engine = ENGINES[name]
    if name.startswith("fsdp"):
        pretend_to_have_gpus()
    if engine.zero is not None:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    asked = set(json.loads((out / f"{name}.json").read_text()))
    cells = parity.all_cells()
    cells |= {c.id: c for c in (cell.its_reference() for cell in cells.values())}
    for cell in (cells[id] for id in sorted(asked)):
        folder = out / cell.id
        folder.mkdir(exist_ok=True)
        try:
            train(cell, folder, out / "models")
        except Exception:
            (folder / "error.txt").write_text(traceback.format_exc())
        forget()


if __name__ == "__main__":
    main()
