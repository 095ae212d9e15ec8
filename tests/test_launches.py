"""The files of recipes/accelerate: profiles that accelerate understands and launches, and a Slurm script."""

import json
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import trl_qtarget
from trl_qtarget.cli.main import main
from trl_qtarget.options.launching import make_launcher


ROOT = Path(trl_qtarget.__file__).parents[1]
FOLDER = ROOT / "recipes/accelerate"
PROFILES = sorted(file.stem for file in FOLDER.glob("*.yaml"))
TYPES = {
    "single": "NO", "ddp": "MULTI_GPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP",
    "multi_node": "DEEPSPEED",
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path, student_dir, teacher_dir, rows, monkeypatch):
    """A YAML file of a training on CPU, two steps of four rows in all."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows(8))))
    settings = {
        "model_name_or_path": student_dir, "teacher_model_name_or_path": teacher_dir, "dtype": "float32",
        "datasets": [{"path": "json", "data_files": "rows.jsonl"}], "output_dir": "out", "use_cpu": True,
        "bf16": False, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    Path("recipe.yaml").write_text(yaml.safe_dump(settings))
    return "recipe.yaml"


def steps(shown: str) -> list[float]:
    """Loss and norm of the gradient, of each step that was printed."""
    return [float(x) for x in re.findall(r"'(?:loss|grad_norm)': '?([0-9.]+)", shown)]


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.mark.parametrize("name", PROFILES)
def test_profile_is_understood(name):
    """Accelerate's own loader, which refuses unknown keys, reads every key of the profile."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command

    file = str(FOLDER / f"{name}.yaml")
    config = load_config_from_file(file)
    assert config.distributed_type == TYPES[name]
    args = make_launcher().parse_args(["--accelerate_config", file, "script"])
    args, *_ = _validate_launch_command(args)
    written = yaml.safe_load(Path(file).read_text())
    written |= written.pop("deepspeed_config", {}) | written.pop("fsdp_config", {})
    del written["distributed_type"]
    assert {key: getattr(args, key) for key in written} == written
    assert (args.use_deepspeed, args.use_fsdp, args.multi_gpu) == tuple(
        config.distributed_type == kind for kind in ("DEEPSPEED", "FSDP", "MULTI_GPU")
    )


def test_every_profile_is_one_that_the_tests_know():
    assert set(PROFILES) == set(TYPES)
    shown = (FOLDER / "README.md").read_text()
    assert all(f"`{name}.yaml`" in shown for name in PROFILES)


def test_nodes_differ_in_their_number_alone():
    """multi_node.yaml is zero3.yaml and the four keys that its comment lists."""
    one, many = (yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in ("zero3", "multi_node"))
    assert {key for key in many if many[key] != one.get(key)} == {
        "num_machines", "num_processes", "main_process_ip", "main_process_port",
    }  # fmt: skip


# The launches. FSDP on CPU is DDP for accelerate: its profile is only read here.


@pytest.fixture
def train(recipe, capfd):
    """`train(*words)` runs `sft` to its end; returns loss and gradient norm of its steps."""

    def run(*words):
        code = main(["sft", "--config", recipe, "--overwrite_output_dir", *words])
        shown = capfd.readouterr()
        assert code == 0, shown.out + shown.err
        assert shown.out.count("Model saved to out.") == 1
        return steps(shown.out + shown.err)

    return run


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3"])
def test_two_processes_of_a_profile_train_as_one(train, name):
    one = train("--accelerate_config", str(FOLDER / "single.yaml"), "--per_device_train_batch_size", "4")
    two = train("--accelerate_config", str(FOLDER / f"{name}.yaml"), "--num_processes", "2")
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["multi_gpu", "zero2"])
def test_trls_profiles_go_on_working(train, name):
    assert len(train("--accelerate_config", name, "--num_processes", "2", "--mixed_precision", "no")) == 4


@pytest.mark.distributed
def test_two_nodes_meet(recipe, train):
    """Two launchers of one process each, on one machine."""
    one = train("--accelerate_config", str(FOLDER / "single.yaml"), "--per_device_train_batch_size", "4")
    words = ["sft", "--config", recipe, "--overwrite_output_dir", "--num_processes", "2"]
    words += ["--accelerate_config", FOLDER / "multi_node.yaml", "--main_process_ip", "127.0.0.1"]
    words += ["--main_process_port", free_port()]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "trl_qtarget", *words, "--machine_rank", str(rank)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    said = [node.communicate(timeout=500)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    for node in said:  # the first process of each prints
        assert steps(node) == pytest.approx(one, rel=1e-4)


# Slurm


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """`slurm(*words)` runs the script with stand-ins for Slurm's commands; returns the command line of each node."""
    folder = tmp_path / "bin"
    folder.mkdir()
    commands = {
        "scontrol": 'echo "$@" >> asked; printf "node-%s\\n" 7 8',
        "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "trl-qtarget": 'printf "%s\\n" "$SLURM_NODEID" "$@" | paste -sd " "',
    }
    for name, text in commands.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    node = {"JOB_ID": "50123", "JOB_NUM_NODES": "2", "JOB_NODELIST": "node-[7-8]", "GPUS_ON_NODE": "4"}
    for name, value in node.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def run(*words):
        script = ["bash", str(FOLDER / "slurm.sh"), *words]
        return subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()

    return run


def test_slurm_starts_a_launcher_on_each_node(slurm):
    told = (
        "--accelerate_config recipes/accelerate/zero3.yaml --num_machines 2 --num_processes 8 "
        "--main_process_ip node-7 --main_process_port 30123 --output_dir runs/mine --config my.yaml --run_name a b"
    )
    said = slurm("runs/mine", "--config", "my.yaml", "--run_name", "a b")
    assert said == [f"{rank} sft {told} --machine_rank {rank}" for rank in (0, 1)]
    assert Path("asked").read_text() == "show hostnames node-[7-8]\n"


def test_slurm_goes_on_from_the_last_checkpoint_that_is_whole(slurm):
    for step in (90, 100, 110):
        Path(f"runs/mine/checkpoint-{step}").mkdir(parents=True)
        if step < 110:
            Path(f"runs/mine/checkpoint-{step}/trainer_state.json").write_text("{}")
    for line in slurm("runs/mine", "--config", "my.yaml"):
        assert "--resume_from_checkpoint runs/mine/checkpoint-100 --machine_rank" in line


def test_slurm_needs_an_output_folder(slurm):
    with pytest.raises(subprocess.CalledProcessError) as stop:
        slurm()
    assert "the output folder comes first" in stop.value.stderr


# The page


def test_the_tables_of_costs_are_those_of_the_formulas():
    path = str(FOLDER / "cost.py")
    made = runpy.run_path(path)
    block = made["TABLES"].search((FOLDER / "README.md").read_text())
    assert block[0] == block[1] + made["tables"]() + block[2], f"run `python {path}`"
