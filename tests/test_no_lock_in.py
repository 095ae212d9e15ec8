"""Plain transformers and plain TRL go on with the output of a run where trl_qtarget cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trl_qtarget.cli.main import main


WITHOUT = "import sys\nsys.modules['trl_qtarget'] = None\n"  # Python's own way to say that a module cannot be imported
LOAD = """
from transformers import AutoModelForCausalLM, AutoTokenizer
try:
    import trl_qtarget
except ImportError:
    AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
else:
    raise SystemExit("trl_qtarget is here after all")
"""
TRL = "import sys\nfrom trl.cli import main\nsys.exit(main(sys.argv[1:]))"
CPU = "--use_cpu true --bf16 false --dtype float32 --report_to none --save_strategy no --max_steps 2"
STAGES = {
    "dpo": "--beta 0.1",
    "grpo": "--reward_funcs rewards.short --num_generations 4 --per_device_train_batch_size 4 "
    "--max_completion_length 8",
}


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """`alone(code, *words)` runs Python in a folder and an environment without this package, its children as well."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/sitecustomize.py").write_text(WITHOUT)
    (tmp_path / "rewards.py").write_text(
        "def short(completions, **columns):\n    return [-len(c) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)

    def run(code, *words):
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "hidden")}
        call = [sys.executable, "-c", code, *words]
        ended = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr[-3000:]

    return run


def train(student_dir, rows, lora):
    """Train fully, or train an adapter and merge it; return the model's folder."""
    from datasets import Dataset
    from peft import LoraConfig

    from trl_qtarget import TargetSFTConfig, TargetSFTTrainer

    args = TargetSFTConfig(
        "adapter" if lora else "full", loss="dft", max_steps=2, use_cpu=True, bf16=False, report_to="none"
    )
    adapter = LoraConfig(task_type="CAUSAL_LM") if lora else None
    trainer = TargetSFTTrainer(student_dir, args, train_dataset=Dataset.from_list(rows), peft_config=adapter)
    trainer.train()
    trainer.save_model()
    if not lora:
        return "full"
    assert main(["merge", "--model_name_or_path", "adapter", "--output_dir", "merged"]) == 0
    return "merged"


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "merged"])
def test_plain_trl_goes_on(alone, student_dir, rows, lora):
    model = train(student_dir, rows(8), lora)
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "7"} for r in rows(8)]
    Path("data").mkdir()
    Path("data/train.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    alone(LOAD.replace("MODEL", repr(model)))
    for command, words in STAGES.items():
        given = ["--model_name_or_path", model, "--dataset_name", "data", "--output_dir", command]
        alone(TRL, command, *given, *CPU.split(), *words.split())
        assert Path(command, "model.safetensors").is_file()
