"""Train with half of every sequence on each of two processes (Ulysses), or on one: `N LOSS... OUT` are the arguments.

Leaves what was logged in OUT/LOSS.json.
"""

import json
import sys

import conftest
import deepspeed
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DeepSpeedSequenceParallelConfig
from datasets import Dataset
from parity_worker import QUIET, forget, zero_config

from trl_qtarget import TargetSFTConfig, TargetSFTTrainer


def halves() -> dict:
    handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
    parallelism = ParallelismConfig(sp_backend="deepspeed", sp_size=2, sp_handler=handler)
    return {"parallelism_config": parallelism, "deepspeed": {**zero_config(2), "sequence_parallel_size": 2}}


def main() -> None:
    processes, *losses, out = sys.argv[1:]
    if processes == "2":
        deepspeed.init_distributed(dist_backend="gloo")
    for loss in losses:
        split = halves() if processes == "2" else {}
        args = TargetSFTConfig(
            output_dir=out, loss=loss, per_device_train_batch_size=4, pad_to_multiple_of=2, **QUIET, **split
        )
        model = conftest.make_model(seed=1, attn_implementation="sdpa")
        data = Dataset.from_list(conftest.make_rows(24))
        try:
            trainer = TargetSFTTrainer(model, args, train_dataset=data, processing_class=conftest.make_tokenizer())
            trainer.train()
            told = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        except ValueError as refusal:
            told = str(refusal)
        with open(f"{out}/{loss}.json", "w") as file:
            json.dump(told, file)
        forget()


if __name__ == "__main__":
    main()
