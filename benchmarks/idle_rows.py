"""Count the rows of a batch that could skip work: their gradient is below rounding, or their teacher has no weight.

    python -m benchmarks.idle_rows --model recipes/quickstart/student --trained runs/quickstart/target_sft-0 \\
        --teacher recipes/quickstart/teacher --data runs/quickstart/data-0/train.jsonl

Two numbers are measured for every labelled token of some batches, before and after training: s * ||p - Q||_1, the L1
norm of its gradient in the logits, and w_r = s * (1 - gamma), the weight of the residual. Where the first is below a
tolerance, the two backward products of the row could be left out; where the second is, its teacher logits. The error
of the row's gradient is then at most the tolerance, or twice the tolerance, in L1. The table shows shares of rows, and
the largest share of the head that leaving them out could save: two of the three products of a loss of label trust, or
one of four with a dense teacher.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from datasets import load_dataset
from rich.table import Table

from benchmarks.kernel import console
from benchmarks.machine import provenance, save
from trl_qtarget.model.forward import install, read_teacher


TOLERANCES = (1e-4, 1e-3, 1e-2)
LOSSES = ("dft", "target_sft")


@torch.no_grad()
def measure(path: Path, args: argparse.Namespace) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(gradient norms, residual weights) of all labelled tokens by loss."""
    from trl_qtarget import TargetSFTConfig, TargetSFTTrainer, build, qtarget_loss

    found: dict[str, list] = {loss: [] for loss in LOSSES}
    with tempfile.TemporaryDirectory() as out:
        config = TargetSFTConfig(out, loss="target_sft", use_cpu=True, bf16=False, max_length=512, report_to="none")
        data = load_dataset("json", data_files=str(args.data), split="train").select(range(args.rows))
        trainer = TargetSFTTrainer(str(path), config, teacher_model=str(args.teacher), train_dataset=data)
        install(trainer.model)
        trainer.model.eval()
        for batch in trainer.get_train_dataloader():
            inputs = {name: x for name, x in batch.items() if name != "labels"}
            student, teacher = read_teacher(trainer.model, inputs), trainer._teacher.read(inputs)
            labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
            for loss in LOSSES:
                out_ = qtarget_loss(
                    student.hidden, student.weight, labels, build(loss),
                    teacher=replace(teacher, hidden=teacher.hidden.flatten(0, 1)),
                    bias=student.bias, logit_scale=student.logit_scale, softcap=student.softcap,
                )  # fmt: skip
                keep = labels != -100
                # both losses have s = 1
                found[loss].append(torch.stack([2 * out_.grad_mass[keep], 1 - out_.trust[keep]]))
    return {loss: tuple(torch.cat(parts, 1)) for loss, parts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="before training")
    parser.add_argument("--trained", type=Path, required=True, help="after it")
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=64, help="rows of the data")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for state, path in (("before", args.model), ("after", args.trained)):
        for loss, (norms, residual) in measure(path, args).items():
            for tolerance in TOLERANCES:
                idle = (norms < tolerance).float().mean().item()
                untaught = (residual < tolerance).float().mean().item()
                backward, teacher = (2 / 3, 0.0) if loss == "dft" else (2 / 4, 1 / 4)
                rows.append({
                    "model": args.model.parent.name, "training": state, "loss": loss, "tokens": len(norms),
                    "tolerance": tolerance, "no_gradient": round(idle, 4), "no_residual": round(untaught, 4),
                    "head_saved_at_best": round(idle * backward + untaught * teacher, 4),
                })  # fmt: skip
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    console.print(f"Written to {save(f'idle_rows_{args.model.parent.name}', rows, provenance())}.")


if __name__ == "__main__":
    main()
