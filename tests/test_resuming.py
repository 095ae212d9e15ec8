"""Unfinished work in `output_dir`: what a second start of `sft` goes on from and what it refuses; unfinished saves."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import trl_qtarget
from trl_qtarget.cli.main import main
from trl_qtarget.files import cut_weights, holds_model, whole_model
from trl_qtarget.options import resuming
from trl_qtarget.scripts import sft
from trl_qtarget.training.trainer import TargetSFTTrainer


ROOT = Path(trl_qtarget.__file__).parents[1]


@pytest.fixture
def start(tmp_path, student_dir, rows, monkeypatch, capfd):
    """`start(*words, stop=None, **changes)` runs `sft` in this process, and returns its exit code and its output.

    stop: the update after which the process ends as if it was killed
    """
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows(8))))
    settings = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "model_name_or_path": student_dir,
        "loss": "dft",
        "datasets": [{"path": "json", "data_files": "rows.jsonl"}],
        "output_dir": "out",
        "max_steps": 5,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dtype": "float32",
    }

    compute_loss = TargetSFTTrainer.compute_loss

    def run(*words, stop=None, **changes):
        left = {name: value for name, value in {**settings, **changes}.items() if value is not None}
        Path("recipe.yaml").write_text(yaml.safe_dump(left))
        monkeypatch.setattr(sys, "argv", ["sft", "--config", "recipe.yaml", *words])

        def until_stopped(trainer, *args, **kwargs):
            if trainer.state.global_step == stop:
                raise KeyboardInterrupt
            return compute_loss(trainer, *args, **kwargs)

        monkeypatch.setattr(TargetSFTTrainer, "compute_loss", until_stopped)
        code = 0
        try:
            sft.run()
        except SystemExit as ended:
            code = ended.code
        except KeyboardInterrupt:
            code = 130
        shown = capfd.readouterr()
        return code, shown.out + shown.err

    return run


def steps(shown: str) -> int:
    return len(re.findall(r"'nll'", shown))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_interrupted_run_goes_on_to_the_same_weights(start):
    assert start(output_dir="whole")[0] == 0
    code, shown = start(stop=3)
    assert (code, steps(shown)) == (130, 3)
    assert not holds_model(Path("out"))
    code, shown = start()
    assert (code, steps(shown)) == (0, 3)
    assert "Resuming from out/checkpoint-2, made with these settings." in shown
    whole, resumed = (load_file(f"{folder}/model.safetensors") for folder in ("whole", "out"))
    assert all((whole[name] == resumed[name]).all() for name in whole)
    assert sorted(path.name for path in Path("out").iterdir() if path.name.startswith(".")) == []


def test_other_settings_are_refused_with_both_choices(start, tmp_path):
    start(stop=3)
    before = tree(tmp_path / "out")
    for words, changes, said in (
        ([], {"loss": "nll"}, r'loss was "dft" and is "nll"'),
        ([], {"learning_rate": 1e-1}, r"learning_rate was 0.01 and is 0.1"),
        ([], {"max_steps": 6, "seed": 1}, r"max_steps was 5 and is 6; seed was 42 and is 1"),
        ([], {"lr_scheduler_type": "cosine"}, r'lr_scheduler_type was "linear" and is "cosine"'),
        ([], {"per_device_train_batch_size": 4}, r"rows of a step was 2 and is 4"),
        (
            ["--resume_from_checkpoint", "true"],
            {"loss_kwargs": {}, "trust_floor": 0.1},
            r"trust_floor was 0.0 and is 0.1",
        ),
        (["--resume_from_checkpoint", "out/checkpoint-2"], {"loss": "nll"}, r'loss was "dft" and is "nll"'),
    ):
        code, shown = start(*words, **changes)
        assert code == 2
        assert re.search(rf"^trl-qtarget sft: out.*\({said}.*\): give another --output_dir", shown, re.M), shown
        assert "--overwrite_output_dir" in shown
        assert tree(tmp_path / "out") == before


def test_other_data_under_the_same_name_are_refused(start, rows, tmp_path):
    start(stop=3)
    before = tree(tmp_path / "out")
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows(8, seed=1))))
    code, shown = start()
    assert code == 2
    assert "fingerprint of the data was" in shown
    assert tree(tmp_path / "out") == before


def test_the_code_of_a_loss_belongs_to_its_settings(start):
    text = "from trl_qtarget import Target\ndef mine() -> Target:\n    return Target(trust={})\n"
    Path("my_loss.py").write_text(text.format(0.5))
    start(stop=3, loss="my_loss.py:mine")
    Path("my_loss.py").write_text(text.format(0.25))
    code, shown = start(loss="my_loss.py:mine")
    assert code == 2
    assert "code of the loss was" in shown


def test_overwriting_starts_from_scratch_and_removes_what_it_replaces(start):
    start(stop=4, save_steps=1)
    code, shown = start("--overwrite_output_dir", loss="nll", stop=1)
    assert (code, steps(shown)) == (130, 1)
    assert resuming.newest_checkpoint(Path("out")) is None
    code, shown = start(loss="nll")
    assert (code, steps(shown)) == (0, 5)
    code, shown = start(loss="nll")
    assert code == 2
    assert "output_dir out holds a finished model: give another --output_dir" in shown


def test_checkpoints_without_a_record_are_refused_unless_asked_for(start):
    start(stop=3)
    Path("out/qtarget_run.json").unlink()
    code, shown = start()
    assert code == 2
    assert "and no qtarget_run.json that says with which settings" in shown
    code, shown = start("--resume_from_checkpoint", "true")
    assert (code, steps(shown)) == (0, 3)


def test_a_checkpoint_of_another_folder_starts_a_run_with_other_settings(start):
    start(stop=3)
    code, shown = start("--resume_from_checkpoint", "out/checkpoint-2", output_dir="next", max_steps=6, stop=5)
    assert (code, steps(shown)) == (130, 3)
    assert "Resuming from out/checkpoint-2, made with other settings: max_steps was 5 and is 6." in shown
    code, shown = start("--resume_from_checkpoint", "out/checkpoint-2", output_dir="next", max_steps=6)
    assert code == 2
    assert "output_dir next holds checkpoints, and out/checkpoint-2 is none of them" in shown
    code, shown = start(output_dir="next", max_steps=6)
    assert (code, steps(shown)) == (0, 2)


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(start):
    start(stop=4)
    assert Path("out/checkpoint-4").is_dir()
    Path("out/checkpoint-4/trainer_state.json").write_text("{")
    code, shown = start("--resume_from_checkpoint", "true")
    assert (code, steps(shown)) == (0, 3)


def test_checkpoints_of_the_last_step_are_no_start(start):
    start("--save_total_limit", "1", save_steps=5)
    Path("out/config.json").unlink()  # as if the save at the end was killed
    code, shown = start("--save_total_limit", "1", save_steps=5)
    assert code == 2
    assert "holds checkpoints of the last step only" in shown


def test_lines_about_a_run_that_cannot_be_resumed(start):
    Path("out").write_text("")
    assert "trl-qtarget sft: output_dir out cannot be written: out is a file" in start()[1]


# The save at the end


def test_a_failed_save_is_a_sentence_and_leaves_no_model(start, monkeypatch):
    def full(trainer, folder, **kwargs):
        Path(folder).mkdir()
        Path(folder, "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TargetSFTTrainer, "save_model", full)
    code, shown = start(save_strategy="no")
    assert code == 1
    assert "trl-qtarget sft: the model is trained and cannot be saved in out: [Errno 28] No space left" in shown
    assert sorted(path.name for path in Path("out").iterdir()) == ["qtarget_run.json"]


@pytest.mark.parametrize("killed_at", ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json"])
def test_a_killed_move_leaves_no_model(tmp_path, killed_at):
    """Each move is a possible end of the process; the files of an earlier model are gone by then."""
    for name in ("config.json", "model.safetensors", "checkpoint-1/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    code = f"""
import os, pathlib, sys
from trl_qtarget.files import whole_model
replace = pathlib.Path.replace
def killed(path, target):
    if path.name == {killed_at!r}:
        os.kill(os.getpid(), 9)
    return replace(path, target)
pathlib.Path.replace = killed
with whole_model(pathlib.Path(sys.argv[1]), writes=True) as folder:
    folder.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "model-2.safetensors", "tokenizer.json"):
        (folder / name).write_text("new")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    assert not holds_model(tmp_path)
    assert (tmp_path / "checkpoint-1/config.json").read_text() == "old"
    with whole_model(tmp_path, writes=True) as folder:
        folder.mkdir()
        (folder / "config.json").write_text("third")
        (folder / "model.safetensors").write_text("third")
    assert holds_model(tmp_path)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"model.safetensors"}


@pytest.mark.slow
def test_kill_in_the_middle_of_the_last_save(start, tmp_path):
    code = """
import os, sys
from trl_qtarget.scripts import sft
from trl_qtarget.training.trainer import TargetSFTTrainer
from transformers import Trainer
save = Trainer._save
def killed(trainer, folder, *args, **kwargs):
    save(trainer, folder, *args, **kwargs)
    if "checkpoint" not in str(folder):
        os.kill(os.getpid(), 9)
Trainer._save = killed
sft.run()
"""
    start(stop=0)  # writes recipe.yaml
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, "--config", "recipe.yaml"], env=env, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not holds_model(tmp_path / "out")
    assert not [*Path("out").glob("*.safetensors"), *Path("out").glob("config.json")]
    code, shown = start()
    assert (code, steps(shown)) == (0, 1)
    assert "Resuming from out/checkpoint-4" in shown
    assert holds_model(tmp_path / "out")
    assert not (tmp_path / "out/.unfinished_model").exists()


@pytest.mark.distributed
def test_two_processes_resume_as_one(start, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    start(stop=0)  # writes recipe.yaml
    words = ["sft", "--config", "recipe.yaml", "--num_processes", "2", "--multi_gpu"]
    assert main(words) == 0
    capfd.readouterr()
    for name in ("config.json", "model.safetensors"):  # as if the save at the end was killed
        Path("out", name).unlink()
    assert main(words) == 0
    shown = capfd.readouterr().out
    assert shown.count("Resuming from out/checkpoint-4, made with these settings.") == 1
    assert steps(shown) == 1
    assert holds_model(Path("out"))
    Path("out/config.json").unlink()
    assert main([*words, "--gradient_accumulation_steps", "2"]) == 2
    assert capfd.readouterr().err.count("rows of a step was 4 and is 8") == 1
    assert not holds_model(Path("out"))


# Weights that are cut off


def test_cut_weights_are_found(student_dir, tmp_path):
    assert cut_weights(Path(student_dir)) is None
    whole = Path(student_dir, "model.safetensors").read_bytes()
    file = tmp_path / "model.safetensors"
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert cut_weights(tmp_path).startswith(f"{file} is cut off")
    file.unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(whole)
    assert cut_weights(tmp_path) == f"{tmp_path / 'model-00002-of-00002.safetensors'} is missing"
