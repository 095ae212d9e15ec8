"""The memory that `trl-qtarget plan` predicts, beside the memory that training takes.

    python -m benchmarks.memory                    # every setting of SETTINGS, each in a process of its own
    python -m benchmarks.memory --only dft asft

A recipe is read as `trl-qtarget sft` reads it, predicted from its configurations, and trained for three steps on the
CPU. In the last step resident memory is measured: its peak until the loss is computed, and its peak in the backward
pass, above the memory of the process after it had trained a tiny model in the same way. glibc hands freed memory back
at once. Models are random, with heads so large that the parts which the prediction calls exact dominate.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.machine import forget_peak, provenance, resident, save


QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart" / "student"
VOCAB, TINY = 98_304, 512
ROWS, ROW_TOKENS, STEPS = 2, 256, 3
HANDS_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
LORA = {"use_peft": True, "lora_target_modules": "all-linear"}
TEACHER = {"teacher_model_name_or_path": "teacher"}
SETTINGS: dict[str, dict[str, Any]] = {
    "nll": {"loss": "nll"},
    "dft, two micro-batches": {"loss": "dft", "gradient_accumulation_steps": 2},
    "dft, gradient checkpointing": {"loss": "dft", "gradient_checkpointing": True},
    "dft, bf16 autocast": {"loss": "dft", "bf16": True},
    "target_sft": {"loss": "target_sft", **TEACHER},
    "target_sft, LoRA": {"loss": "target_sft", **TEACHER, **LORA},
    "target_sft, cached teacher": {"loss": "target_sft", "teacher_cache": "cache"},
    "asft, a copy for reference": {"loss": "asft"},
    "asft, LoRA, adapters off": {"loss": "asft", **LORA},
}
COLUMNS = ("predicted_loss", "measured_loss", "predicted_update", "measured_update")
console = Console()


def make(folder: Path, vocab: int, width: int) -> None:
    """A random model with the tokenizer of the quickstart, whose ids are the first of its rows."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=width // 4, tie_word_embeddings=True, max_position_embeddings=1024,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(QUICKSTART).save_pretrained(folder)


def prepare(folder: Path) -> None:
    """Models, a tiny one of each, and data of token ids."""
    for prefix, vocab, width in (("", VOCAB, 768), ("tiny-", TINY, 16)):
        make(folder / f"{prefix}student", vocab, width)
        make(folder / f"{prefix}teacher", vocab, width * 3 // 2)
    draw = random.Random(0)
    rows = [{"input_ids": [draw.randrange(10, 40) for _ in range(ROW_TOKENS)]} for _ in range(4 * ROWS * STEPS)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({**row, "labels": row["input_ids"]}) for row in rows))


def recipe(name: str, folder: Path, tiny: bool = False) -> Path:
    """A setting as a YAML file, of the tiny models if wanted."""
    settings = {
        "model_name_or_path": "student", "output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none",
        "gradient_checkpointing": False, "max_length": ROW_TOKENS, "per_device_train_batch_size": ROWS,
        "max_steps": STEPS, "save_strategy": "no", "disable_tqdm": True, "num_processes": 1,
        "datasets": [{"path": "json", "data_files": str(folder / "rows.jsonl")}], **SETTINGS[name],
    }  # fmt: skip
    for option in ("model_name_or_path", "teacher_model_name_or_path", "teacher_cache", "output_dir"):
        if option in settings:
            settings[option] = str(folder / f"{'tiny-' if tiny else ''}{settings[option]}")
    file = folder / f"{'tiny' if tiny else 'recipe'}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def predict(file: Path) -> dict[str, float]:
    """MiB at the two moments, of which the first is the dearer of the teacher's forward and the loss."""
    from trl_qtarget.planning.memory import totals
    from trl_qtarget.planning.sizes import run_of
    from trl_qtarget.scripts import plan

    parsed = plan.make_parser().parse(["--config", str(file)])
    bytes_at = totals(run_of(*parsed.values, engine=plan.Engine()))
    return {
        "predicted_loss": max(bytes_at["teacher"], bytes_at["loss"]) / 2**20,
        "predicted_update": bytes_at["update"] / 2**20,
    }


def train(file: Path) -> dict[str, int]:
    """KiB at the two moments of the last step."""
    from transformers import TrainerCallback

    from trl_qtarget.scripts import sft

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            peaks["measured_update"] = resident("VmHWM")

    peaks: dict[str, int] = {}
    trainer = sft.make_trainer(*sft.make_parser().parse(["--config", str(file)]).values)
    compute = trainer.compute_loss

    def watched(*given: Any, **options: Any) -> Any:
        forget_peak()
        loss = compute(*given, **options)
        peaks["measured_loss"] = resident("VmHWM")
        forget_peak()
        return loss

    trainer.compute_loss = watched
    trainer.add_callback(Watch())
    trainer.train()
    return peaks


def measure(name: str, folder: Path) -> dict[str, float]:
    train(recipe(name, folder, tiny=True))
    before = resident("VmRSS")
    return {moment: (peak - before) / 2**10 for moment, peak in train(recipe(name, folder)).items()}


def measured_apart(name: str, folder: Path) -> dict[str, float]:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--measure", name, "--folder", str(folder)],
        capture_output=True, text=True, env={**os.environ, **HANDS_BACK},
    )  # fmt: skip
    if run.returncode:
        sys.exit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def make_caches(folder: Path) -> None:
    from trl_qtarget.cli.main import main as command

    for tiny in (False, True):
        file = recipe("target_sft, cached teacher", folder, tiny)
        teacher = str(folder / f"{'tiny-' if tiny else ''}teacher")
        command(["cache", "--config", str(file), "--teacher_model_name_or_path", teacher])


def compare(names: list[str], folder: Path) -> list[dict[str, Any]]:
    """Predicted and measured MiB of each setting, and by how much the prediction of the peak is off."""
    prepare(folder)
    if any("cached" in name for name in names):
        make_caches(folder)
    rows = []
    for name in names:
        found = {**predict(recipe(name, folder)), **measured_apart(name, folder)}
        predicted, measured = (
            max(found[f"{kind}_{moment}"] for moment in ("loss", "update")) for kind in ("predicted", "measured")
        )
        rounded = {column: round(found[column]) for column in COLUMNS}
        rows.append({"setting": name, **rounded, "error_of_peak": round(predicted / measured - 1, 3)})
        console.print(*rows[-1].values())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--measure", choices=SETTINGS, help=argparse.SUPPRESS)  # the child process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.measure:
        print(json.dumps(measure(args.measure, args.folder)))
        return
    folder = Path(tempfile.mkdtemp())
    try:
        rows = compare(args.only, folder)
    finally:
        shutil.rmtree(folder)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    console.print(save("memory_cpu", rows, provenance()))


if __name__ == "__main__":
    main()
