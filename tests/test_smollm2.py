"""The chain of recipes/smollm2-135m on a stand-in: its data, its rewards, its plan, and two steps of each stage."""

import importlib
import json
import os
import random
import sys
from pathlib import Path

import pytest
import yaml

import trl_qtarget
from trl_qtarget import user_code
from trl_qtarget.chain.execute import history
from trl_qtarget.cli.main import main


ROOT = Path(trl_qtarget.__file__).parents[1]
FOLDER = ROOT / "recipes/smollm2-135m"
SOLUTION = "Of 24 apples 20 are left.\nThen 24 * 2.0 - 4 = 20.\nSo 20 remain, not 120 or 20.5.\n#### 20"
QUESTION = [{"role": "user", "content": "How many?"}]


@pytest.fixture
def prepare():
    return user_code.load(str(FOLDER / "prepare.py"))


@pytest.fixture
def rewards(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    return importlib.import_module("recipes.smollm2-135m.rewards")


@pytest.fixture
def chain(tmp_path, monkeypatch, rewards, student_dir):
    """`chain(grpo={...}, ...)` writes the recipe with changes of stages, over a stand-in and rows of its columns."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    said = [{"role": "assistant", "content": SOLUTION}]
    rows = {
        "train": {"prompt": QUESTION, "completion": said, "answer": "20"},
        "pairs": {"prompt": QUESTION, "chosen": said, "rejected": [{"role": "assistant", "content": SOLUTION[:-1]}]},
        "prompts": {"prompt": QUESTION, "answer": "20"},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 8)

    def write(**changes):
        text = (FOLDER / "chain.yaml").read_text().replace("runs/smollm2-135m/model", student_dir)
        content = yaml.safe_load(text.replace("runs/smollm2-135m", str(tmp_path)))
        for stage in content["stages"]:
            stage |= changes.get("every", {}) | changes.get(stage.get("name", stage["command"]), {})
        (tmp_path / "chain.yaml").write_text(yaml.safe_dump(content))
        return str(tmp_path / "chain.yaml")

    return write


def test_a_slip_changes_the_result_and_nothing_else(prepare):
    seen = set()
    for seed in range(50):
        made = prepare.with_a_slip(SOLUTION, random.Random(seed))
        wrong = made.rpartition(" ")[2]
        assert made == prepare.with_a_slip(SOLUTION, random.Random(seed))
        assert made == (
            f"Of 24 apples {wrong} are left.\nThen 24 * 2.0 - 4 = {wrong}.\n"
            f"So {wrong} remain, not 120 or 20.5.\n#### {wrong}"
        )
        seen.add(int(wrong))
    assert seen == {10, 18, 19, 21, 22, 30}
    for text in ("#### 1", "#### 0", "#### -3", "#### 7.0"):
        sign = float(text[5:])
        made = [float(prepare.with_a_slip(text, random.Random(seed))[5:]) for seed in range(50)]
        assert all(number != sign and number * sign >= 0 for number in made)


def test_rewards(rewards):
    texts = ["so\n#### 20", "####20.0 ", "#### 21", "20", "#### 20 apples", "#### 3\n#### 20"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    assert rewards.right(completions, answer=["20"] * 6, prompts=[]) == [1, 1, 0, 0, 0, 1]
    assert rewards.ends_with_result(completions, answer=["20"] * 6) == [1, 1, 1, 0, 0, 1]


def test_the_plan(chain, tmp_path, capsys):
    assert main(["chain", "--config", chain(), "--dry_run"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert all(str(tmp_path / "chain" / line[0]) in " ".join(line) for line in lines[1:])  # not cut, in a log
    plan = [("teacher", "sft"), ("sft", "sft"), ("sft-merge", "merge"), ("dpo", "dpo"), ("dpo-merge", "merge")]
    assert [tuple(line[:2]) for line in lines[1:]] == [*plan, ("grpo", "grpo"), ("grpo-merge", "merge")]


@pytest.mark.slow
def test_two_steps_of_each_stage(chain, tmp_path):
    from transformers import AutoModelForCausalLM

    small = {"every": {"max_steps": 2}, "grpo": {"max_completion_length": 16}}
    assert main(["chain", "--config", chain(**small)]) == 0
    rows = {name: history(tmp_path / "chain" / name / "log.txt") for name in ("teacher", "sft", "dpo", "grpo")}
    assert {name: len([row for row in made if "grad_norm" in row]) for name, made in rows.items()} == dict.fromkeys(
        rows, 2
    )
    assert "qtarget/trust" in rows["sft"][0]
    assert rows["dpo"][0]["rewards/margins"] == 0
    assert rows["grpo"][0]["kl"] == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "chain/grpo-merge/model")
