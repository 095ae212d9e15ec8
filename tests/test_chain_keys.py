"""The key of a stage: it depends on the stage's inputs, and on nothing else that happens to be on the disk."""

from pathlib import Path

import pytest
import yaml

from trl_qtarget.chain import chain_file, keys, plan


OPTIONS = ["loss", "model_name_or_path", "datasets", "env", "output_dir", "report_to"]
SFT = {"command": "sft", "loss": "dft", "model_name_or_path": "model", "dataset_name": "data"}
FILES = {
    "model/config.json": "{}",
    "model/model.safetensors": "weights",
    "data/train.jsonl": "{}",
    "data/more/train.jsonl": "{}",
    "cache/manifest.json": "{}",
    "my_loss.py": "def own(): pass\n",
    "package/__init__.py": "",
    "package/rules.py": "def own(): pass\n",
    "template.jinja": "{{ messages }}",
    "config.yaml": "{}",
    "problems.jsonl": "{}",
}


def write(files):
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(FILES)


def key_of(output_dir="out", **settings):
    stage = {**SFT, **settings}
    Path("chain.yaml").write_text(yaml.safe_dump({"output_dir": output_dir, "stages": [stage]}))
    stages = plan.resolve(chain_file.read("chain.yaml"), dict.fromkeys(("sft", "grpo", "eval", "cache"), OPTIONS))
    return keys.keys(stages)[stages[-1].name]


@pytest.mark.parametrize(
    "settings",
    [
        {"report_to": "wandb"},
        {"report_to": ["tensorboard", "trackio"]},
        {"env": {"HF_HOME": "hf", "WANDB_DIR": "logs"}},
        {"run_name": "first", "project": "mine", "hub_model_id": "me/mine"},
        {"lr_scheduler_type": "cosine", "optim": "sgd", "logging_dir": "logs"},
        {"loss": "dft"},
        {"command": "grpo", "reward_funcs": ["accuracy_reward"]},
        {"accelerate_config": "zero3"},
        {"datasets": [{"path": "json", "name": "main", "split": "train", "data_files": "problems.jsonl"}]},
        {"command": "eval", "dataset": "problems.jsonl", "verifier": "exact", "prompt_column": "question"},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_a_folder_of_the_name_of_a_setting_is_no_input(settings):
    before = key_of(**settings)
    texts = yaml.safe_load(Path("chain.yaml").read_text())["stages"][0]
    names = {str(name) for value in texts.values() for name in flat(value)} - {"model", "data", "problems.jsonl"}
    for name in names:
        write({f"{name}/run-1/events": "1", f"{name}.py": "1"})
    assert len(names) > 1
    assert key_of(**settings) == before


def flat(value):
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from flat(inner)
    else:
        yield value


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("model/model.safetensors", {}),
        ("model/config.json", {"teacher_model_name_or_path": "model", "model_name_or_path": "owner/name"}),
        ("model/config.json", {"command": "grpo", "reward_model_name_or_path": "model"}),
        ("model/config.json", {"command": "eval", "model_name_or_path": ["owner/name", "model"]}),
        ("data/more/train.jsonl", {}),
        ("data/train.jsonl", {"dataset_name": None, "datasets": [{"path": "data"}]}),
        ("data/more/train.jsonl", {"datasets": [{"path": "json", "data_files": {"train": "data/*/*.jsonl"}}]}),
        ("data/train.jsonl", {"datasets": [{"path": "json", "data_dir": "data"}]}),
        ("cache/manifest.json", {"teacher_cache": "cache"}),
        ("my_loss.py", {"loss": "my_loss:own"}),
        ("my_loss.py", {"loss": "my_loss.py:own"}),
        ("my_loss.py", {"loss": "my_loss.py"}),
        ("my_loss.py", {"command": "grpo", "reward_funcs": ["accuracy_reward", "my_loss.own"]}),
        ("package/rules.py", {"command": "grpo", "reward_funcs": "package.rules.own"}),
        ("my_loss.py", {"command": "eval", "dataset": "problems.jsonl", "verifier": "my_loss:own"}),
        ("problems.jsonl", {"command": "eval", "dataset": "problems.jsonl"}),
        ("template.jinja", {"chat_template_path": "template.jinja"}),
        ("config.yaml", {"accelerate_config": "config.yaml"}),
        ("config.yaml", {"config_file": "config.yaml"}),
        ("config.yaml", {"deepspeed": "config.yaml"}),
        ("config.yaml", {"deepspeed_config_file": "config.yaml"}),
        ("config.yaml", {"fsdp_config": "config.yaml"}),
    ],
)
def test_an_input_is_part_of_the_key(file, settings):
    before = key_of(**settings)
    Path(file).write_text(FILES[file] + " ")
    assert key_of(**settings) != before
    Path(file).write_text(FILES[file])
    assert key_of(**settings) == before


def test_files_that_work_on_data_leaves_beside_it_are_no_input():
    settings = {"dataset_name": "data", "teacher_cache": "cache"}
    before = key_of("data/out", **settings)
    write({"data/cache-0123456789abcdef.arrow": "a map of `datasets`", "cache/.lock": "", "data/out/sft/log.txt": ""})
    assert key_of("data/out", **settings) == before
    write({"data/more.jsonl": "{}"})
    assert key_of("data/out", **settings) != before


def test_a_model_in_the_chains_own_folder_is_an_input():
    write({"out/mine/config.json": "{}"})
    before = key_of(model_name_or_path="out/mine")
    write({"out/mine/config.json": "{ }"})
    assert key_of(model_name_or_path="out/mine") != before


EARLIER = [  # keys of these settings and files before keys were limited to settings that name inputs
    ({}, "ed3e0f94b56e1ae6"),
    ({"report_to": "wandb", "env": {"HF_HOME": "hf"}}, "ad67d4f656c8624f"),
    ({"model_name_or_path": "owner/name", "dataset_name": "owner/data", "run_name": "x"}, "f206142434fc66ca"),
    ({"loss": "my_loss.py:own"}, "47221360982c43b2"),
    (
        {"loss": "package.rules:own", "teacher_model_name_or_path": "model", "teacher_cache": "cache"},
        "13d2292d897ae5ce",
    ),
    (
        {"command": "grpo", "reward_funcs": ["accuracy_reward", "my_loss.own"], "reward_model_name_or_path": "model"},
        "7efa642499a6f394",
    ),
    (
        {"accelerate_config": "config.yaml", "fsdp_config": "config.yaml", "chat_template_path": "template.jinja"},
        "3bb208d99aa079a4",
    ),
    (
        {
            "dataset_name": None,
            "datasets": [{"path": "json", "data_files": ["data/*.jsonl", "data/more/train.jsonl"]}, {"path": "data"}],
        },
        "025e7e7bc54b4931",
    ),
    (
        {
            "command": "eval",
            "dataset": "problems.jsonl",
            "model_name_or_path": ["model"],
            "verifier": "my_loss.py:own",
        },
        "a72950bcc1c3c47b",
    ),
]


@pytest.mark.parametrize(("settings", "key"), EARLIER)
def test_keys_are_those_of_earlier_versions(settings, key):
    assert key_of(**settings)[:16] == key
