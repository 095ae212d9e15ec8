"""Train the tiny student for three steps of four rows in all, on however many processes, and write what was logged."""

import json
import sys

import conftest
from datasets import Dataset

from trl_qtarget import TargetSFTConfig, TargetSFTTrainer


def main() -> None:
    loss, processes, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    args = TargetSFTConfig(
        output_dir=out, loss=loss, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        disable_tqdm=True, save_strategy="no", logging_steps=1, learning_rate=1e-2, lr_scheduler_type="constant",
        per_device_train_batch_size=4 // processes, max_steps=3,
    )  # fmt: skip
    teacher = conftest.make_model(hidden=48, tie=False, seed=2) if loss == "target_sft" else None
    rows = conftest.make_rows(16)
    if loss == "critical_token":  # one number for each row rides along as one for each of its tokens
        rows = [{**row, "token_weight": i % 3 / 2, "trust": 0.5 if i % 4 else None} for i, row in enumerate(rows)]
    trainer = TargetSFTTrainer(
        conftest.make_model(seed=1),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=conftest.make_tokenizer(),
        teacher_model=teacher,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        with open(f"{out}/steps.json", "w") as file:
            json.dump(steps, file)


if __name__ == "__main__":
    main()
