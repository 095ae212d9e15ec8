"""One rank of an evaluation: `torchrun evaluation_worker.py FOLDER ROWS_PER_RANK PADDING_FREE`, for the tests."""

import json
import sys
from pathlib import Path

from conftest import make_model, make_rows, make_tokenizer
from datasets import Dataset

from trl_qtarget import TargetSFTConfig, TargetSFTTrainer


def main(folder: Path, rows_per_rank: int, padding_free: bool) -> None:
    args = TargetSFTConfig(
        str(folder / "out"), loss="dft", use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        per_device_eval_batch_size=rows_per_rank, padding_free=padding_free, gradient_checkpointing=False,
        max_length=None,
    )  # fmt: skip
    data = Dataset.from_list(make_rows(7))
    trainer = TargetSFTTrainer(
        make_model(), args, train_dataset=data, eval_dataset=data, processing_class=make_tokenizer()
    )
    metrics = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        (folder / "metrics.json").write_text(json.dumps({k: v for k, v in metrics.items() if isinstance(v, float)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True")
