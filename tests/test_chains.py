"""The chains of the recipes, and those that benchmarks/chains.py makes of them: understood, and with -m slow run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import trl_qtarget
from benchmarks import chains
from trl_qtarget.chain.plan import read, resolve
from trl_qtarget.chain.validate import options, validate


ROOT = Path(trl_qtarget.__file__).parents[1]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder in which the recipes are found and may write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("recipes").symlink_to(ROOT / "recipes")
    return tmp_path


def make_data(*words):
    subprocess.run([sys.executable, "recipes/quickstart/task.py", "--output_dir", chains.DATA, *words], check=True)


@pytest.fixture(scope="module")
def known():
    return {command: options(command) for command in ("sft", "grpo", "dpo", "eval", "merge")}


@pytest.mark.parametrize("method", chains.METHODS)
def test_the_recipe_is_understood(method, workplace, known):
    make_data()
    stages = resolve(read(str(chains.METHODS[method])), known)
    ready, found = validate(stages, set())
    assert not found
    own = yaml.safe_load(Path("recipes/quickstart/target_sft.yaml").read_text())
    assert all(ready["sft"].settings[key] == own[key] for key in chains.OF_THE_LOSS)


@pytest.mark.parametrize("method", chains.METHODS)
def test_the_comparison_changes_the_loss_and_the_rate_alone(method, workplace, known):
    rates = dict.fromkeys(chains.STARTS, (1e-4, 3e-4))
    stages = resolve(read(str(chains.make_chain(method, 7, rates, Path("out"), "validation"))), known)
    ready, found = validate(stages, set())
    assert not found
    settings = {name: {**made.settings} for name, made in ready.items()}
    assert settings["sft-dft"]["loss"] == "dft"
    assert "teacher_model_name_or_path" not in settings["sft-dft"]
    last = {start: settings[f"{method}-{start}-0.0003"] for start in chains.STARTS}
    assert last["nll"].pop("model_name_or_path") == "out/draw-7/sft-nll/model"
    assert last["none"].pop("model_name_or_path") == chains.STUDENT
    for start in ("nll", "none"):
        last[start].pop("output_dir")
    if method == "dpo":
        assert last["nll"].pop("datasets") != last["none"].pop("datasets")
    assert last["nll"] == last["none"]
    assert len(settings[f"eval-{method}"]["model_name_or_path"]) == 1 + 3 + 2 * 4


def test_table(capsys):
    rows = [
        {"start": start, "draw": draw, "learning_rate": 1e-4, "entropy": 0.5, "pairs": None}
        | {f"{when}_{score}": value + draw / 10 for when, value in (("before", 0.2), ("after", 0.4))
           for score in chains.SCORES}
        for start in chains.STARTS
        for draw in (0, 1)
    ]  # fmt: skip
    text = chains.table("grpo", rows)
    assert "| `dft` | 0.0001 | 0.500 | 25.0 +- 5.0 | 45.0 +- 5.0 | 25.0 +- 5.0" in text
    assert "| +20.0 +- 0.0 |" in text
    assert "Average@16 after, target_sft minus nll: +0.0 +- 0.0" in text


@pytest.mark.slow
@pytest.mark.parametrize("method", chains.METHODS)
def test_the_recipe_runs(method, workplace):
    """From end to end, with a few steps and problems."""
    make_data("--practice", "40", "--held_out", "10")
    recipe = yaml.safe_load(chains.METHODS[method].read_text())
    recipe["output_dir"] = "out"
    recipe["defaults"]["max_steps"] = 12
    for stage in recipe["stages"]:
        stage.pop("max_steps", None)
    Path("chain.yaml").write_text(yaml.safe_dump(recipe))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    call = [sys.executable, "-m", "trl_qtarget", "chain", "--config", "chain.yaml"]
    assert subprocess.run(call, env=environment, check=False).returncode == 0
    results = json.loads(Path("out/eval/results/results.json").read_text())["results"]
    assert [Path(r["model"]).parts[-2:] for r in results] == [
        ("quickstart", "student"), ("sft", "model"), (method, "model")
    ]  # fmt: skip
    assert results[1]["average_at_k"] != results[2]["average_at_k"]
