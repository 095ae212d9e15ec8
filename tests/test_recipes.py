"""Every recipe is understood, the files of a setting differ in their method only, and each trains on a tiny model."""

import json
import os
from pathlib import Path

import pytest
import yaml

import trl_qtarget
from trl_qtarget.scripts.sft import make_parser, make_trainer


ROOT = Path(trl_qtarget.__file__).parents[1]
# Files for other commands than sft.
OTHERS = ("chain", "eval")
RECIPES = sorted(
    file
    for file in ROOT.glob("recipes/**/*.yaml")
    if file.parent.name != "accelerate" and not file.name.startswith(OTHERS)
)
SETTINGS = sorted({file.parent for file in RECIPES if file.relative_to(ROOT).parts[1].startswith(("qwen", "llama"))})
METHODS = ("target_sft", "dft", "nll")
OF_THE_METHOD = {"loss", "loss_kwargs", "learning_rate", "output_dir"}
SAMPLE = (
    "recipes/llama-3.2-3b/dft.yaml",
    "recipes/qwen2.5-7b/target_sft.yaml",
    "recipes/qwen3-1.7b/numinamath/nll.yaml",
    "recipes/qwen3-1.7b/openr1/target_sft.yaml",
    "recipes/lora/asft.yaml",
)
ROW = {
    "numinamath": {"problem": "1+1?", "solution": "It is \\boxed{2}.", "source": "x", "messages": []},
    "openr1": {"problem": "1+1?", "messages": [{"role": "user", "content": "?"}, {"role": "x", "content": "2"}]},
    "m23k": {"prompt": "Which? A or B", "reasoning": "hm", "distilled_answer_string": "\\boxed{A}"},
    "plain": {"prompt": "1+1=", "completion": "2"},
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Recipes and trainers may write into the environment; relative paths of recipes start at the repository."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("file", RECIPES, ids=name)
def test_every_recipe_is_understood(file):
    make_parser().parse(["--config", str(file), "--use_cpu", "--bf16", "false"])


def test_the_papers_ten_settings_are_there():
    assert len(SETTINGS) == 10


@pytest.mark.parametrize("folder", SETTINGS, ids=name)
def test_files_of_a_setting_differ_in_the_method_only(folder):
    def shared(method):
        settings = yaml.safe_load((folder / f"{method}.yaml").read_text())
        assert settings["loss"] == method
        return {
            k: v for k, v in settings.items() if k not in OF_THE_METHOD and not k.startswith(("teacher_", "trust_"))
        }

    first, *others = map(shared, METHODS)
    assert all(other == first for other in others)


def kind(settings: dict) -> str:
    path = settings["datasets"][0]["path"].lower() if "datasets" in settings else ""
    kinds = {"numinamath": "numinamath", "openr1": "openr1", "m23k": "m23k"}
    return next((kind for part, kind in kinds.items() if part in path), "plain")


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, id=name(file), marks=[] if name(file) in SAMPLE else pytest.mark.slow) for file in RECIPES],
)
def test_two_steps(file, tmp_path, student_dir, teacher_dir):
    """The recipe trains for two steps on the CPU, with a tiny model, a tiny teacher, and data that has its columns.

    The end of a turn is the stand-in's, and a teacher cache is left out: tests/test_cache.py covers it.
    """
    settings = yaml.safe_load(file.read_text())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text((json.dumps(ROW[kind(settings)]) + "\n") * 8)
    settings.pop("datasets", None)
    settings.pop("teacher_cache", None)
    settings |= {
        "model_name_or_path": student_dir,
        "dataset_name": str(tmp_path / "data"),
        "eos_token": "<|im_end|>",
        "output_dir": str(tmp_path / "out"),
        "dtype": "float32",
        "max_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }
    settings.setdefault("loss", "nll")  # recipes of TRL's own loss serve `trl sft` too, which knows no such key
    if "teacher_model_name_or_path" in settings:
        settings["teacher_model_name_or_path"] = teacher_dir
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    trainer = make_trainer(*make_parser().parse(["--config", str(recipe)]).values)
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.state.log_history[-1]["train_loss"] > 0
