"""Chains of stages: what is refused before anything starts, what runs again, and that a killed one ends the same."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml

import trl_qtarget
from trl_qtarget import user_code
from trl_qtarget.chain import chain_file, commands, execute, keys, page, plan
from trl_qtarget.cli.main import main


ROOT = Path(trl_qtarget.__file__).parents[1]
CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "dtype": "float32", "max_steps": 2, "logging_steps": 1}
REWARDS = "def short(completions, **columns):\n    return [-float(len(text)) for text in completions]\n"


def data(name):
    return {"datasets": [{"path": "json", "data_files": name}]}


@pytest.fixture
def workplace(tmp_path, monkeypatch, rows):
    """A folder with data for every command, which the test runs in."""
    monkeypatch.chdir(tmp_path)
    made = rows(8)
    files = {
        "rows.jsonl": made,
        "pairs.jsonl": [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "7"} for r in made],
        "prompts.jsonl": [{"prompt": r["prompt"], "answer": r["completion"]} for r in made],
    }
    for name, content in files.items():
        Path(name).write_text("\n".join(map(json.dumps, content)) + "\n")
    Path("my_rewards.py").write_text(REWARDS)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return tmp_path


@pytest.fixture
def chain(workplace, student_dir):
    """`chain(defaults, sft={...}, dpo={...})` writes sft -> dpo -> grpo with changes (None removes)."""
    stages = {
        "sft": {"loss": "dft", "model_name_or_path": student_dir, "use_peft": True, **data("rows.jsonl")},
        "dpo": data("pairs.jsonl"),
        "grpo": {"reward_funcs": "my_rewards.short", "num_generations": 4, **data("prompts.jsonl")},
    }

    def write(top=None, **changes):
        entries = []
        for name, settings in stages.items():
            merged = {"name": name, "command": name, **settings, **changes.get(name, {})}
            entries.append({key: value for key, value in merged.items() if value is not None})
        content = {"output_dir": "runs", "defaults": CPU, "stages": entries, **(top or {})}
        Path("chain.yaml").write_text(yaml.safe_dump(content))
        return "chain.yaml"

    return write


LOG = {
    "sft": ["{'loss': '2', 'nll': '3', 'epoch': '0.5'}", "{'loss': '1', 'nll': '2.5', 'epoch': '1'}"],
    "merge": ["{'logit_difference': 1e-07}"],
    "dpo": ["{'loss': '0.69', 'rewards/margins': '0', 'epoch': '1'}"],
    "grpo": ["  0%|   | 0/2{'loss': '0', 'reward': '-1.5', 'kl': '0', 'epoch': '1'}\r"],
}


@pytest.fixture
def started(monkeypatch):
    """The words of commands that are not run: each writes a file of its settings for a model; `fail` names one."""

    class Started(list):
        fail = None
        log = LOG

    calls = Started()

    def run(stage, words, fresh, show):
        calls.append(words)
        rows = calls.log[stage.command]
        stage.log.write_text("\n".join(rows) + "\n")
        stage.output.mkdir(parents=True, exist_ok=True)
        execute.check_step0(stage, execute.metrics(rows)[0])
        if stage.name == calls.fail:
            stage.log.write_text("10%|#| 1/2\nValueError: no luck\n")
            return 1
        (stage.output / "config.json").write_text(stage.config.read_text())
        return 0

    monkeypatch.setattr(execute, "execute", run)
    return calls


def ran(calls):
    names = [Path(words[2]).parent.name for words in calls]
    calls.clear()
    return names


def refused(config, capsys, *words):
    assert main(["chain", "--config", config, *words]) == 2
    assert not Path("runs").exists()
    return [
        line.removeprefix("trl-qtarget chain: ") for line in capsys.readouterr().err.splitlines() if "chain: " in line
    ]


# The plan


def test_a_chain_is_ordinary_commands(chain, started, capsys):
    assert main(["chain", "--config", chain()]) == 0
    assert [words[0] for words in started] == ["sft", "merge", "dpo", "grpo"]
    files = {name: yaml.safe_load(Path(f"runs/{name}/stage.yaml").read_text()) for name in ("sft", "dpo", "grpo")}
    assert files["sft"]["output_dir"] == "runs/sft/model"
    assert files["dpo"]["model_name_or_path"] == "runs/sft-merge/model"
    assert files["grpo"]["model_name_or_path"] == "runs/dpo/model"
    assert files["dpo"]["logging_first_step"] is True
    assert files["grpo"]["reward_funcs"] == ["my_rewards.short"]  # TRL's parser would take a text letter by letter
    assert Path("runs/dpo/stage.yaml").read_text().startswith("# trl-qtarget dpo --config runs/dpo/stage.yaml\n")
    shown = capsys.readouterr().out
    assert "[3/4] dpo" in shown
    assert "reward -1.5" in shown
    assert keys.record(Path("runs/sft")).metric == "nll 2.5"  # of the last of two rows


def test_dry_run_shows_the_plan_and_writes_nothing(chain, started, capsys):
    assert main(["chain", "--config", chain(), "--dry_run"]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["dpo", "dpo", "sft-merge", "runs/dpo/model", "runs"] in shown
    assert not started
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("grpo", "why"),
    [
        ({}, "with beta 0 nothing of a reference is logged"),
        ({"beta": 0.1, "logging_first_step": False, "logging_steps": 2}, "logging_first_step is false"),
        ({"command": "rloo", "step0_tolerance": "null"}, "step0_tolerance is null"),
        ({"command": "rloo"}, None),
        ({"beta": 0.1}, None),
    ],
)
def test_says_that_step0_is_not_checked(chain, started, capsys, grpo, why):
    config = Path(chain(grpo=grpo))
    config.write_text(config.read_text().replace("'null'", "null"))
    started.log = LOG | {"rloo": LOG["grpo"]}
    for words in (["--dry_run"], []):
        assert main(["chain", "--config", str(config), *words]) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if "step 0 is not checked" in line]
        assert [line.rpartition("step 0 is not checked: ")[2].strip() for line in said] == [why] * (why is not None)


def test_references_and_words(chain, started):
    reference = "${stages.sft.output_dir}"
    config = chain(
        dpo={"model_name_or_path": reference, "eval_strategy": False, "multi_gpu": True, "num_processes": 2}
    )
    Path(config).write_text(Path(config).read_text().replace("eval_strategy: false", "eval_strategy: no"))
    assert main(["chain", "--config", config]) == 0
    settings = yaml.safe_load(Path("runs/dpo/stage.yaml").read_text())
    assert settings["model_name_or_path"] == "runs/sft-merge/model"
    assert settings["eval_strategy"] == "no"
    assert settings["num_processes"] == "2"
    assert started[2] == ["dpo", "--config", "runs/dpo/stage.yaml", "--multi_gpu"]
    for _ in range(2):  # when it runs, and when it was done before
        assert (
            "<code>trl-qtarget dpo --config runs/dpo/stage.yaml --multi_gpu</code>"
            in Path("runs/chain.html").read_text()
        )
        assert main(["chain", "--config", config]) == 0


def test_defaults_are_for_the_stages_that_know_them(chain, started):
    evaluation = {"command": "eval", "dataset": "prompts.jsonl", "k": 2}
    config = chain({"defaults": CPU | {"seed": 7, "num_generations": 4}})
    content = yaml.safe_load(Path(config).read_text())
    content["stages"].append(evaluation)
    Path(config).write_text(yaml.safe_dump(content))
    started.log = LOG | {"eval": ["{'a': 1}"]}
    assert main(["chain", "--config", config]) == 0
    settings = {name: yaml.safe_load(Path(f"runs/{name}/stage.yaml").read_text()) for name in ("sft", "grpo", "eval")}
    assert settings["eval"]["model_name_or_path"] == ["runs/grpo/model"]
    assert [made["seed"] for made in settings.values()] == [7, 7, 7]
    assert [made.get("num_generations") for made in settings.values()] == [None, 4, None]


def sampled(**settings):
    """A stage that evaluates the SFT model, before the DPO stage."""
    evaluation = {"name": "pairs", "command": "eval", "dataset": "prompts.jsonl", "k": 2, **settings}
    content = yaml.safe_load(Path("chain.yaml").read_text())
    content["stages"].insert(1, evaluation)
    Path("chain.yaml").write_text(yaml.safe_dump(content))
    return "chain.yaml"


PAIRS = "${stages.pairs.output_dir}/pairs.jsonl"


def test_data_of_a_stage_to_come(chain, started):
    chain(dpo=data(PAIRS), sft={"use_peft": False})
    started.log = LOG | {"eval": ["{'a': 1}"]}
    assert main(["chain", "--config", sampled(pairs=1, model_name_or_path=["${stages.sft.output_dir}"])]) == 0
    settings = yaml.safe_load(Path("runs/dpo/stage.yaml").read_text())
    assert settings["datasets"][0]["data_files"] == "runs/pairs/results/pairs.jsonl"
    assert ran(started) == ["sft", "pairs", "dpo", "grpo"]
    file = Path("runs/pairs/results/pairs.jsonl")
    assert not file.exists()  # it was not looked for
    Path("runs/sft/model/model.safetensors").touch()
    file.write_text(json.dumps({"prompt": "1", "chosen": "2"}) + "\n")
    config = Path("chain.yaml")
    config.write_text(config.read_text().replace("name: dpo", "name: dpo\n  beta: 0.2"))
    assert main(["chain", "--config", "chain.yaml"]) == 2
    assert not started


@pytest.mark.parametrize(
    ("changes", "pairs", "said"),
    [
        ({"dpo": data(PAIRS)}, {}, "stage dpo: the data runs/pairs/results/pairs.jsonl cannot be read: that stage "),
        ({"dpo": data(PAIRS[:-1])}, {"pairs": 1}, "stage dpo: the data runs/pairs/results/pairs.json cannot be read"),
        (
            {"dpo": {"datasets": None, "dataset_name": PAIRS.removesuffix("/pairs.jsonl")}},
            {"pairs": 1},
            "stage dpo: the data runs/pairs/results cannot be read: that stage writes pairs.jsonl; an eval with",
        ),
        (
            {"grpo": data("${stages.dpo.output_dir}/x.jsonl")},
            {"pairs": 1},
            "stage grpo: the data runs/dpo/model/x.jsonl cannot be read: that stage writes no data; an eval with",
        ),
    ],
)
def test_data_that_no_stage_will_write(chain, started, capsys, changes, pairs, said):
    chain(**changes)
    (line,) = refused(sampled(**pairs), capsys)
    assert line.startswith(said)
    assert not started


# References to outputs of earlier stages


def settings_of(stage, root="runs"):
    return yaml.safe_load(Path(root, stage, "stage.yaml").read_text())


def read_by(stage, capsys):
    """The stages that a dry run shows `stage` to read."""
    capsys.readouterr()
    assert main(["chain", "--config", "chain.yaml", "--dry_run"]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    (cells,) = ([cell.strip() for cell in line if cell.strip()] for line in lines if line[0].strip() == stage)
    return [] if cells[2].startswith("runs") else cells[2].split(", ")


def append(**stage):
    content = yaml.safe_load(Path("chain.yaml").read_text())
    content["stages"].append(stage)
    Path("chain.yaml").write_text(yaml.safe_dump(content))


@pytest.mark.parametrize("root", ["my runs/of today", "a  folder: of #1/" + "words " * 30 + "end"])
def test_an_output_dir_that_yaml_would_quote_or_fold(chain, started, root):
    config = chain({"output_dir": root}, dpo={"ref_model_init_kwargs": None, "run_name": "${stages.sft.output_dir}"})
    append(name="pairs", command="eval", dataset="prompts.jsonl", k=2, pairs=1)
    append(name="more", command="dpo", **data("${stages.pairs.output_dir}/pairs.jsonl"))
    started.log = LOG | {"eval": ["{'a': 1}"]}
    assert main(["chain", "--config", config]) == 0
    assert settings_of("sft", root)["output_dir"] == f"{root}/sft/model"
    assert settings_of("dpo", root)["model_name_or_path"] == f"{root}/sft-merge/model"
    assert settings_of("dpo", root)["run_name"] == f"{root}/sft-merge/model"
    assert settings_of("more", root)["datasets"][0]["data_files"] == f"{root}/pairs/results/pairs.jsonl"
    config_file = f"{root}/dpo/stage.yaml"
    by_hand = Path(config_file).read_text().partition("\n")[0]
    assert shlex.split(by_hand.removeprefix("# ")) == ["trl-qtarget", "dpo", "--config", config_file]
    ran(started)
    assert main(["chain", "--config", config]) == 0
    assert not started


CHECKPOINT = "${stages.sft.output_dir}/checkpoint-100"


def test_a_checkpoint_of_a_stage_to_come(chain, started, capsys):
    config = chain(sft={"use_peft": None}, dpo={"model_name_or_path": CHECKPOINT})
    assert read_by("dpo", capsys) == ["sft"]
    assert main(["chain", "--config", config]) == 0
    assert settings_of("dpo")["model_name_or_path"] == "runs/sft/model/checkpoint-100"
    started.clear()
    config = chain(sft={"use_peft": None, "learning_rate": 1e-3}, dpo={"model_name_or_path": CHECKPOINT})
    assert main(["chain", "--config", config, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("has changed: runs, the old one is kept aside") == 3  # sft, and what reads it


@pytest.mark.parametrize(
    ("changes", "path", "said"),
    [
        ({}, CHECKPOINT, "model_name_or_path: there is no folder runs/sft-merge/model/checkpoint-100"),
        (
            {"use_peft": None},
            CHECKPOINT.replace("check", "chuck"),
            "model_name_or_path: there is no folder runs/sft/mo",
        ),
        ({"handoff": "adapter"}, CHECKPOINT, "dpo cannot start from an adapter alone"),
    ],
)
def test_what_no_stage_will_write_is_not_referred_to(chain, started, capsys, changes, path, said):
    (line,) = refused(chain(sft=changes, dpo={"model_name_or_path": path}), capsys)
    assert line.startswith(f"stage dpo: {said}")


def test_references_in_lists_and_mappings(chain, started, capsys):
    chain(sft={"use_peft": None})
    files = ["${stages.pairs.output_dir}/pairs.jsonl", "pairs.jsonl"]
    append(
        name="more",
        command="dpo",
        model_name_or_path="Qwen/Qwen3-0.6B",
        datasets=[{"path": "json", "data_files": files}],
        env={"TEACHER_FOLDER": "${stages.sft.output_dir}"},
    )
    started.log = LOG | {"eval": ["{'a': 1}"]}
    sampled(pairs=1, model_name_or_path=["${stages.sft.output_dir}"])
    models = ["Qwen/Qwen3-0.6B", "${stages.sft.output_dir}", "${stages.dpo.output_dir}/checkpoint-2"]
    append(name="scores", command="eval", model_name_or_path=models, dataset="prompts.jsonl", k=2)
    assert read_by("scores", capsys) == ["sft", "dpo"]
    assert read_by("more", capsys) == ["sft", "pairs"]
    assert main(["chain", "--config", "chain.yaml"]) == 0
    models = ["Qwen/Qwen3-0.6B", "runs/sft/model", "runs/dpo/model/checkpoint-2"]
    assert settings_of("scores")["model_name_or_path"] == models
    assert settings_of("more")["datasets"][0]["data_files"] == ["runs/pairs/results/pairs.jsonl", "pairs.jsonl"]
    assert settings_of("more")["env"] == {"TEACHER_FOLDER": "runs/sft/model"}
    assert "TEACHER_FOLDER" not in os.environ


def test_two_references_in_one_text(chain, started, capsys):
    both = "${stages.sft.output_dir} and ${stages.dpo.output_dir}"
    changes = {"sft": {"use_peft": None}, "grpo": {"run_name": both, "model_name_or_path": "Qwen/Qwen3-0.6B"}}
    config = chain(**changes)
    assert read_by("grpo", capsys) == ["sft", "dpo"]
    assert main(["chain", "--config", config]) == 0
    assert settings_of("grpo")["run_name"] == "runs/sft/model and runs/dpo/model"
    ran(started)
    assert main(["chain", "--config", chain(**changes, dpo={"beta": 0.2})]) == 0
    assert ran(started) == ["dpo", "grpo"]


@pytest.mark.parametrize(
    ("text", "reads"),
    [
        ("runs/sft/model", ["sft", "sft-merge"]),  # the adapter itself, by its path: as good as a reference
        ("runs/sft/model/checkpoint-2", ["sft", "sft-merge"]),
        ("runs/sft/model-2", ["sft-merge"]),
        ("from runs/sft/model", ["sft-merge"]),
        ("planned/sft", ["sft-merge"]),
        ("runs/grpo/model", ["sft-merge"]),  # comes later
    ],
)
def test_texts_that_are_like_an_output(chain, started, capsys, text, reads):
    config = chain(dpo={"run_name": text})
    assert read_by("dpo", capsys) == reads
    assert main(["chain", "--config", config]) == 0
    assert settings_of("dpo")["run_name"] == text


def test_a_path_in_a_mistake_is_the_real_one(chain, started, capsys):
    (line,) = refused(chain(dpo={"learning_rate": "${stages.sft.output_dir}"}), capsys)
    assert line == "stage dpo: learning_rate must be a number, got 'runs/sft-merge/model'"


def test_keys_are_those_of_earlier_versions(tmp_path, monkeypatch):
    """A chain that has been run must not run again because the package was updated."""
    monkeypatch.chdir(tmp_path)
    Path("chain.yaml").write_text(KEYS_OF)
    Path("my_loss.py").write_text("def own(): pass\n")
    Path("rows.jsonl").write_text("{}\n")
    known = {
        "sft": ["loss", "use_peft", "model_name_or_path", "datasets", "env", "teacher_cache", "output_dir"],
        "cache": ["model_name_or_path", "teacher_model_name_or_path", "datasets", "env"],
        "grpo": ["model_name_or_path", "dataset_name", "reward_funcs", "output_dir", "env"],
        "eval": ["model_name_or_path", "dataset", "pairs", "output_dir"],
        "merge": ["model_name_or_path", "output_dir"],
    }
    stages = plan.resolve(chain_file.read("chain.yaml"), known)
    assert {name: key[:16] for name, key in keys.keys(stages).items()} == KEYS


KEYS_OF = """\
output_dir: out
defaults: {env: {A: 1, 2: b}}
stages:
  - {command: sft, loss: "my_loss.py:own", use_peft: true, model_name_or_path: org/m,
     datasets: [{path: json, data_files: "*.jsonl"}]}
  - {name: cache, command: cache, teacher_model_name_or_path: "${stages.sft.output_dir}", model_name_or_path: org/m,
     datasets: [{path: json, data_files: rows.jsonl}]}
  - {name: target, command: sft, loss: target_sft, teacher_cache: out/cache/cache, model_name_or_path: org/m}
  - {name: pairs, command: eval, dataset: rows.jsonl, pairs: 2, model_name_or_path: ["${stages.sft.output_dir}", o/m]}
  - {command: grpo, dataset_name: "${stages.pairs.output_dir}/pairs.jsonl", reward_funcs: [accuracy_reward],
     model_name_or_path: out/sft/model}
"""
KEYS = {  # as version 0.1 made them before references were typed
    "sft": "da76609764c18089",
    "sft-merge": "3276b56bdd4f8950",
    "cache": "d9c9dbdf2bc0601c",
    "target": "345df7664618ce1a",
    "pairs": "0698f67fc80b7edd",
    "grpo": "2a282398af61d97a",
}


# What is refused


@pytest.mark.parametrize(
    ("top", "changes", "said"),
    [
        ({"stage": []}, {}, "chain.yaml: unknown key 'stage' (did you mean 'stages'?)"),
        ({"output_dir": None}, {}, "chain.yaml: output_dir must be the folder of the whole chain, got None"),
        ({"stages": []}, {}, "chain.yaml: stages must be a list of mappings, as in `- command: sft`"),
        ({}, {"dpo": {"command": "ppo"}}, "stage dpo: command must be one of sft, dpo, "),
        ({}, {"dpo": {"command": ["dpo"]}}, "stage dpo: command must be one of sft, dpo, "),
        ({}, {"dpo": {"name": "a/b"}}, "stage a/b: name must be of letters"),
        ({}, {"dpo": {"name": "sft"}}, "stage sft: the name is taken, give it another `name`"),
        ({}, {"dpo": {"handoff": "split"}}, "stage dpo: handoff must be one of auto, merge, adapter, got 'split'"),
        ({}, {"dpo": {"handoff": "merge"}}, "stage dpo: handoff is for adapters: set use_peft: true, or leave it out"),
        ({}, {"dpo": {"output_dir": "x"}}, "stage dpo: leave out output_dir: every stage writes into the chain's"),
        ({}, {"dpo": {"step0_tolerance": -1}}, "stage dpo: step0_tolerance must be a number of at least 0"),
        ({}, {"sft": {"step0_tolerance": 1}}, "stage sft: sft has no reference, so it takes no step0_tolerance"),
        ({}, {"sft": {"hub_token": "hf_x"}}, "stage sft: leave out the secret in hub_token"),
        ({}, {"sft": {"env": {"WANDB_API_KEY": "x"}}}, "stage sft: leave out the secret in env"),
        ({}, {"sft": {"env": {"COMET_TOKEN": "x"}}}, "stage sft: leave out the secret in env"),
        ({}, {"sft": {"env": {"DB_PASS": 123}}}, "stage sft: leave out the secret in env"),
        ({}, {"sft": {"run_name": "x-hf_" + "a1" * 10}}, "stage sft: leave out the secret in run_name"),
        ({}, {"sft": {"run_name": "sk-proj-" + "a1" * 10}}, "stage sft: leave out the secret in run_name"),
        ({}, {"sft": {"env": {"HTTPS_PROXY": "http://me:pw@host:1"}}}, "stage sft: leave out the secret in env"),
        ({}, {"dpo": {"name": "options.json"}}, "stage options.json: name must be another one, 'options.json' is"),
        ({}, {"dpo": {"name": "chain.html"}}, "stage chain.html: name must be another one"),
        ({}, {"dpo": {"name": "sft.old-1"}}, "stage sft.old-1: name must be another one"),
        ({"defaults": CPU | {"report_to": ["hf_x"]}}, {}, "defaults: leave out the secret in report_to"),
        (
            {},
            {"dpo": {"run_name": "${stages.sfft.output_dir}"}},
            "stage dpo: run_name refers to stage 'sfft', and there",
        ),
        ({}, {"dpo": {"run_name": "${stages.grpo.output_dir}"}}, "stage dpo: run_name refers to stage 'grpo'"),
        ({}, {"dpo": {"run_name": "${sft}"}}, "stage dpo: run_name has '${sft}': the only reference is"),
        ({"defaults": CPU | {"use_cpuu": True}}, {}, "defaults: no stage knows 'use_cpuu' (did you mean 'use_cpu'?)"),
        ({}, {"dpo": {"betta": 1}}, "stage dpo: unknown key 'betta' (did you mean 'beta'?)"),
        ({}, {"dpo": {"handof": "merge"}}, "stage dpo: unknown key 'handof' (did you mean 'handoff'?)"),
        ({}, {"dpo": {"beta": "much"}}, "stage dpo: beta must be a number, got 'much'"),
        ({}, {"dpo": {"model_name_or_path": "./no"}}, "stage dpo: model_name_or_path: there is no folder ./no"),
        (
            {},
            {"dpo": data("rows.jsonl")},
            "stage dpo: the data rows.jsonl has the columns prompt, completion: dpo reads",
        ),
        ({}, {"dpo": data("no.jsonl")}, "stage dpo: the data no.jsonl cannot be read"),
        ({}, {"dpo": {"datasets": None}}, "stage dpo: no data: pass --dataset_name"),
        (
            {},
            {"grpo": {"reward_funcs": "my_rewards.shrt"}},
            "stage grpo: reward_funcs: my_rewards.shrt: there is no shrt",
        ),
        ({}, {"grpo": {"reward_funcs": "no_such.x"}}, "stage grpo: reward_funcs: no_such.x: importing no_such failed"),
        (
            {},
            {"grpo": {"reward_funcs": "my_rewards.py:short"}},
            "stage grpo: reward_funcs: my_rewards.py:short: TRL takes",
        ),
        ({}, {"grpo": {"reward_funcs": None}}, "stage grpo: no reward: set reward_funcs"),
        ({}, {"grpo": {"num_generations": 3}}, "stage grpo: generation_batch_size"),
        ({}, {"sft": {"loss": "target_sft"}}, "stage sft: loss 'target_sft' needs a teacher"),
        ({}, {"sft": {"handoff": "adapter"}}, "stage dpo: dpo cannot start from an adapter alone"),
    ],
)
def test_mistakes(chain, started, capsys, top, changes, said):
    (line,) = refused(chain(top, **changes), capsys)
    assert line.startswith(said)
    assert not started


def test_mistakes_of_all_stages_at_once(chain, started, capsys):
    """Whatever finds them: the chain's file, its references, the commands' parsers, their dataclasses, the disk."""
    lines = refused(
        chain(
            {"defaults": CPU | {"use_cpuu": True}},
            sft={"los": 1, "model_name_or_path": "./no", "teacher_model_name_or_path": "./t", "teacher_cache": "./c"},
            dpo={"command": "dpoo", "betta": 1, "max_steps": "x", "ref_model_name": "${stages.sff.output_dir}"},
            grpo={"env": {"HF_TOKEN": "x"}, "num_generations": 3, "reward_funcs": "no", **data("no.jsonl")},
        ),
        capsys,
    )
    expected = [
        "stage dpo: command must be one of sft, dpo, ",
        "stage grpo: leave out the secret in env",
        "defaults: no stage knows 'use_cpuu'",
        "stage dpo: ref_model_name refers to stage 'sff'",
        "stage sft: unknown key 'los'",
        "stage sft: model_name_or_path: there is no folder ./no",
        "stage sft: teacher_model_name_or_path: there is no folder ./t",
        "stage sft: teacher_cache: there is no folder ./c",
        "stage dpo: unknown key 'betta'",
        "stage dpo: unknown key 'ref_model_name'",
        "stage dpo: max_steps must be a whole number, got 'x'",
        "stage grpo: generation_batch_size",
        "stage grpo: the data no.jsonl cannot be read",
        "stage grpo: reward_funcs: no: there is no no in trl.rewards",
    ]
    assert [line[: len(start)] for line, start in zip(sorted(lines), sorted(expected), strict=True)] == sorted(
        expected
    )
    assert not started


def several(*stages, **top):
    Path("chain.yaml").write_text(yaml.safe_dump({"output_dir": "runs", **top, "stages": list(stages)}))
    return "chain.yaml"


def test_an_output_dir_in_a_stage_hides_no_other_mistake(workplace, started, capsys):
    stage = {"command": "sft", "output_dir": "x", "model_name_or_path": "./no", "loss": "dft", **CPU}
    leave_out = "leave out output_dir: every stage writes into the chain's output_dir"
    assert refused(several(stage, {"command": "dpo", "output_dir": ["y"], "betta": 1, **CPU}), capsys) == [
        f"stage sft: {leave_out}",
        f"stage dpo: {leave_out}",
        "stage sft: model_name_or_path: there is no folder ./no",
        "stage sft: no data: pass --dataset_name, or list `datasets` in the YAML file",
        "stage dpo: unknown key 'betta' (did you mean 'beta'?)",
    ]
    lines = refused(several(stage, output_dir=None, defaults={"output_dir": "x", "seeed": 1}), capsys, "--to", "dpo")
    assert lines == [
        "chain.yaml: output_dir must be the folder of the whole chain, got None",
        f"stage sft: {leave_out}",
        "defaults: no stage knows 'seeed' (did you mean 'seed'?)",
        f"defaults: {leave_out}",
        "--to dpo: there is no such stage, there are sft",
        "stage sft: model_name_or_path: there is no folder ./no",
        "stage sft: no data: pass --dataset_name, or list `datasets` in the YAML file",
    ]


def test_a_stage_that_cannot_be_read_hides_no_other_mistake(workplace, started, capsys):
    """Nor do the stages after it lack the model or the reference that it would have given them."""
    good = {"command": "dpo", **data("pairs.jsonl"), **CPU}
    more = {"run_name": "${stages.x.output_dir}", "beta": "much"}
    lines = refused(several({"command": "banana", "name": "x"}, "sft", {**good, **more}, {**good, "los": 1}), capsys)
    assert lines == [
        "stage x: command must be one of sft, dpo, kto, grpo, rloo, reward, merge, cache, eval, got 'banana'",
        "stage 2: must be a mapping, got 'sft'",
        "stage dpo: the name is taken, give it another `name`",
        "stage dpo: beta must be a number, got 'much'",
        "stage dpo#4: unknown key 'los'",
    ]
    Path("runs.txt").touch()
    lines = refused(several({**good, "name": "a/b", "betta": 1}, output_dir="runs.txt"), capsys)
    assert lines[:2] == [
        "chain.yaml: output_dir must be a folder, and runs.txt is a file",
        "stage a/b: name must be of letters, digits, '.', '_' and '-', got 'a/b'",
    ]
    assert "stage a/b: unknown key 'betta' (did you mean 'beta'?)" in lines


def test_a_teacher_of_a_stage_to_come(chain, started):
    chain()
    content = yaml.safe_load(Path("chain.yaml").read_text())
    settings = {"model_name_or_path": content["stages"][0]["model_name_or_path"], **data("rows.jsonl")}
    for name, more in (("cache", {}), ("target", {"loss": "target_sft", "teacher_cache": "runs/cache/cache"})):
        teacher = {} if more else {"teacher_model_name_or_path": "${stages.sft.output_dir}"}
        command = "sft" if more else "cache"
        content["stages"].append({"name": name, "command": command, **settings, **teacher, **more})
    Path("chain.yaml").write_text(yaml.safe_dump(content))
    assert main(["chain", "--config", "chain.yaml", "--dry_run"]) == 0


@pytest.mark.parametrize("name", ["task-vectors-of-a-long-name", "rlhf_preferences", "http://host:80/a", "BYPASS"])
def test_no_secret(chain, started, name):
    assert main(["chain", "--config", chain(sft={"run_name": name, "env": {"BYPASS": name}}), "--dry_run"]) == 0


@pytest.mark.parametrize("split", ["train[:50%]", "train[2:]", "train[:2]+train[4:]"])
def test_a_part_of_a_split_has_its_columns(chain, started, split):
    sources = [{"path": "json", "data_files": "rows.jsonl", "split": split}]
    assert main(["chain", "--config", chain(sft={"datasets": sources}), "--dry_run"]) == 0


def test_full_disk(chain, started, capsys, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("trl_qtarget.chain.inputs.shutil.disk_usage", lambda path: usage)
    (line,) = refused(chain(), capsys)
    assert line.startswith("output_dir runs: models and checkpoints take about 0.0 GiB")


def test_environment_of_a_stage_stays_its_own(chain, started):
    assert main(["chain", "--config", chain(sft={"env": {"QTARGET_TEST": 3}})]) == 0
    assert "QTARGET_TEST" not in os.environ
    assert yaml.safe_load(Path("runs/sft/stage.yaml").read_text())["env"] == {"QTARGET_TEST": 3}


# What runs again


def test_what_is_done_is_skipped_and_what_changed_is_kept(chain, started):
    config = chain()
    assert main(["chain", "--config", config]) == 0
    started.clear()
    assert main(["chain", "--config", config]) == 0
    assert not started
    assert main(["chain", "--config", chain(dpo={"beta": 0.2})]) == 0
    assert ran(started) == ["dpo", "grpo"]
    assert "beta" not in Path("runs/dpo.old-1/stage.yaml").read_text()
    assert Path("runs/grpo.old-1/model/config.json").is_file()
    Path("rows.jsonl").write_text(Path("rows.jsonl").read_text() * 2)
    assert main(["chain", "--config", chain(dpo={"beta": 0.2})]) == 0
    assert ran(started) == ["sft", "sft-merge", "dpo", "grpo"]
    Path("my_rewards.py").write_text(REWARDS + "\n# changed\n")
    assert main(["chain", "--config", chain(dpo={"beta": 0.2})]) == 0
    assert ran(started) == ["grpo"]
    assert Path("runs/grpo.old-3").is_dir()


def test_what_is_moved_aside_is_said_before_it_moves(chain, started, capsys, monkeypatch):
    assert main(["chain", "--config", chain()]) == 0
    said, rename = {}, Path.rename

    def recorded(path, target):
        said[str(path)] = capsys.readouterr().out.splitlines()[-1].strip()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", recorded)
    assert main(["chain", "--config", chain(dpo={"beta": 0.2})]) == 0
    assert said == {
        f"runs/{name}": f"the last run's folder runs/{name} is kept as runs/{name}.old-1" for name in ("dpo", "grpo")
    }


def test_a_folder_that_appears_beside_a_chain_changes_nothing(chain, started):
    """As a logger, an environment variable and a run leave them."""
    config = chain(sft={"env": {"HF_HOME": "hf"}, "run_name": "first"}, dpo={"run_name": "logs"})
    assert main(["chain", "--config", config]) == 0
    for name in ("hf", "first", "logs", "none", "float32"):
        Path(name, "run").mkdir(parents=True)
        Path(name, "run", "events").write_text("1")
    started.clear()
    assert main(["chain", "--config", config]) == 0
    assert not started


def test_a_function_of_a_module_elsewhere_is_an_input(chain, started, workplace, monkeypatch):
    """A package on PYTHONPATH, whose own module is not imported to know where the function's lies."""
    package = workplace.with_name(f"{workplace.name}-elsewhere") / "my_package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    file = package / "rules.py"
    monkeypatch.syspath_prepend(package.parent)
    for name in ("my_package", "my_package.rules"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    file.write_text(REWARDS)
    config = chain(grpo={"reward_funcs": "my_package.rules.short"})
    assert main(["chain", "--config", config]) == 0
    started.clear()
    assert main(["chain", "--config", config]) == 0
    assert not started
    file.write_text(REWARDS + "\n# changed\n")
    assert main(["chain", "--config", config]) == 0
    assert ran(started) == ["grpo"]
    assert user_code.file_of("my_package.rules") == file
    for none in ("", "no_such", "my_package.no", "trl.rewards", ".", "a/b.py", "sys"):
        assert user_code.file_of(none) is None


def test_the_file_of_a_module_in_a_folder_without_init(tmp_path, monkeypatch):
    """As recipes/smollm2-135m/rewards.py has it: namespace packages, one with a name that is no identifier."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = Path("namespace-1/two/rules.py").absolute()
    file.parent.mkdir(parents=True)
    file.write_text("one = 1\n")
    assert user_code.file_of("namespace-1.two.rules") == file
    assert user_code.file_of("namespace-1.three.rules") is None
    assert user_code.file_of("namespace-1.two") is None
    assert user_code.load("namespace-1.two.rules").one == 1


def test_the_command_line_needs_no_file_locks():
    """Windows has no fcntl, and every command that lists all options imports the chain's parser."""
    code = "import sys; sys.modules['fcntl'] = None; from trl_qtarget.chain.run import make_parser; make_parser()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_help_and_readme_agree_on_several_machines(capsys):
    with pytest.raises(SystemExit):
        main(["chain", "--help"])
    assert "on several machines run the stages' commands by hand" in " ".join(capsys.readouterr().out.split())


def test_from_and_to(chain, started, capsys):
    config = chain()
    assert main(["chain", "--config", config, "--to", "sft"]) == 0
    assert ran(started) == ["sft"]
    assert main(["chain", "--config", config, "--from", "dpo"]) == 2
    assert "--from dpo: stage sft-merge before it is not done with these settings" in capsys.readouterr().err
    assert main(["chain", "--config", config]) == 0
    assert ran(started) == ["sft-merge", "dpo", "grpo"]
    assert main(["chain", "--config", config, "--from", "dpo", "--to", "dpo"]) == 0
    assert ran(started) == ["dpo"]
    assert Path("runs/dpo.old-1").is_dir()
    assert main(["chain", "--config", config, "--to", "dppo"]) == 2
    assert "--to dppo: there is no such stage, there are sft, sft-merge, dpo, grpo" in capsys.readouterr().err


def test_a_failed_stage_says_how_and_is_tried_again(chain, started, capsys):
    started.fail = "dpo"
    assert main(["chain", "--config", chain()]) == 1
    said = capsys.readouterr().err
    assert "stage dpo failed: exit code 1" in said
    assert "    ValueError: no luck\n  log: runs/dpo/log.txt\n  by hand: trl-qtarget dpo --config runs/dpo" in said
    assert "10%" not in said
    assert ran(started) == ["sft", "sft-merge", "dpo"]
    started.fail = None
    assert main(["chain", "--config", chain()]) == 0
    assert ran(started) == ["dpo", "grpo"]
    assert keys.record(Path("runs/dpo")).attempts == 2


def test_goes_on_from_the_newest_whole_checkpoint(chain, started):
    started.fail = "dpo"
    assert main(["chain", "--config", chain()]) == 1
    for number, whole in ((2, True), (10, True), (12, False)):
        folder = Path(f"runs/dpo/model/checkpoint-{number}")
        folder.mkdir()
        (folder / "optimizer.pt").write_text("")
        (folder / "trainer_state.json").write_text("{}" if whole else '{"half')
    started.fail = None
    started.clear()
    assert main(["chain", "--config", chain()]) == 0
    assert started[0][-2:] == ["--resume_from_checkpoint", "runs/dpo/model/checkpoint-10"]
    assert main(["chain", "--config", chain(dpo={"beta": 0.2})]) == 0
    assert "--resume_from_checkpoint" not in started[2]  # it belongs to other settings


@pytest.mark.parametrize(("kept", "resumed"), [((50, 60), ["--resume_from_checkpoint", "checkpoint-50"]), ((60,), [])])
def test_a_checkpoint_after_the_last_step_is_not_gone_on_from(chain, started, capsys, kept, resumed):
    """Trainer would take step 61 before it looks at max_steps."""
    started.fail = "dpo"
    assert main(["chain", "--config", chain()]) == 1
    for number in kept:
        folder = Path(f"runs/dpo/model/checkpoint-{number}")
        folder.mkdir()
        (folder / "optimizer.pt").touch()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": number, "max_steps": 60}))
    capsys.readouterr()
    assert main(["chain", "--config", chain(), "--dry_run"]) == 0
    assert ("goes on from checkpoint-50" if resumed else "starts again") in capsys.readouterr().out
    started.fail = None
    started.clear()
    assert main(["chain", "--config", chain()]) == 0
    assert [word.rpartition("/")[2] for word in started[0][3:]] == resumed
    assert Path("runs/dpo/model/checkpoint-60").exists() == bool(resumed)


def test_half_a_checkpoint_is_not_gone_on_from(chain, started):
    """Trainer was killed while it deleted the last but one, with save_total_limit: 1."""
    started.fail = "dpo"
    assert main(["chain", "--config", chain()]) == 1
    for number, names in ((50, ["optimizer.pt"]), (60, ["optimizer.pt", "model.safetensors"])):
        for name in names:
            path = Path(f"runs/dpo/model/checkpoint-{number}", name)
            path.parent.mkdir(exist_ok=True)
            path.touch()
        (path.parent / "trainer_state.json").write_text(json.dumps({"global_step": number, "max_steps": 60}))
    started.fail = None
    started.clear()
    assert main(["chain", "--config", chain()]) == 0
    assert "--resume_from_checkpoint" not in started[0]


def test_a_stage_killed_before_its_first_record_is_no_foreign_folder(chain, started):
    unfinished = Path("runs/dpo/.stage.json.0123456789abcdef0123456789abcdef.tmp")
    unfinished.parent.mkdir(parents=True)
    unfinished.touch()
    assert main(["chain", "--config", chain()]) == 0


def test_a_folder_of_somebody_else_is_left_alone(chain, started, capsys):
    Path("runs/dpo").mkdir(parents=True)
    Path("runs/dpo/thesis.tex").write_text("x")
    assert main(["chain", "--config", chain()]) == 2
    assert "stage dpo: runs/dpo is no stage of a chain" in capsys.readouterr().err
    assert Path("runs/dpo/thesis.tex").read_text() == "x"
    assert not started


def test_one_chain_at_a_time(chain, started, capsys, monkeypatch):
    config, inner = chain(), []
    run = execute.execute

    def twice(*args):
        if not inner:
            inner.append(main(["chain", "--config", config]))
        return run(*args)

    monkeypatch.setattr(execute, "execute", twice)
    assert main(["chain", "--config", config]) == 0
    assert inner == [2]
    assert f"another chain runs in runs (process {os.getpid()} on " in capsys.readouterr().err
    assert not Path("runs/.lock").exists()


def test_a_moved_chain_is_still_done(chain, started):
    assert main(["chain", "--config", chain()]) == 0
    Path("runs").rename("elsewhere")
    started.clear()
    assert main(["chain", "--config", chain({"output_dir": "elsewhere"})]) == 0
    assert not started


# The first step of a stage


@pytest.mark.parametrize(
    ("command", "row", "metric"),
    [
        ("dpo", {"rewards/margins": 0.5}, "rewards/margins is 0.5"),
        ("dpo", {"rewards/chosen": -3.0, "rewards/margins": 0.0}, "rewards/chosen is -3"),
        ("grpo", {"kl": 0.3}, "kl is 0.3"),
        ("rloo", {"kl": float("nan")}, "kl is nan"),
        ("grpo", {"clip_ratio/region_mean": 0.1}, "clip_ratio/region_mean is 0.1"),
        ("dpo", {"rewards/margins": 0.001}, None),
        ("kto", {"kl": 0.3}, None),  # of other pairs than the batch's
        ("sft", {"kl": 9.0}, None),
    ],
)
def test_step0(command, row, metric):
    tolerance = chain_file.TOLERANCE if command in commands.STEP0_CHECKED else None
    stage = plan.Stage("x", command, Path("x"), {}, tolerance)
    if metric is None:
        execute.check_step0(stage, row)
        return
    with pytest.raises(execute.StepZero, match=re.escape(f"at the first step {metric}, not 0 within 0.02")):
        execute.check_step0(stage, row)


def test_step0_ends_the_chain(chain, started, capsys):
    started.log = LOG | {"dpo": ["{'loss': '9', 'rewards/margins': '1.25', 'epoch': '1'}"]}
    assert main(["chain", "--config", chain()]) == 1
    assert "stage dpo failed: at the first step rewards/margins is 1.25" in capsys.readouterr().err
    assert not Path("runs/dpo/model").exists()
    assert main(["chain", "--config", chain(dpo={"step0_tolerance": None})]) == 1  # None removes it from the file
    started.log = LOG
    assert main(["chain", "--config", chain()]) == 0


# Running a command


@pytest.fixture
def stage(workplace, monkeypatch):
    """A stage whose command is a module of the test's own: `stage(code)` runs it."""
    monkeypatch.setenv("PYTHONPATH", str(workplace))
    made = plan.Stage("x", "dpo", workplace / "x", {}, 0.02)
    made.folder.mkdir()

    def run(code, fresh=True, rows=None):
        package = workplace / "trl_qtarget"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text("import os, sys, time\n" + code)
        return execute.execute(made, ["words"], fresh, (rows if rows is not None else []).append)

    run.stage = made
    return run


def test_execute_reads_the_log_as_it_grows(stage):
    rows = []
    assert (
        stage(
            "print({'loss': '1', 'epoch': 0.5}, end='\\r'); print('x', {'b': 2.0}, sys.argv[1]); sys.exit(3)",
            rows=rows,
        )
        == 3
    )
    assert rows == [{"loss": 1.0, "epoch": 0.5}, {"b": 2.0}]
    assert stage("print({'loss': 2})", fresh=False) == 0
    assert stage.stage.log.read_text().count("loss") == 2


def test_execute_stops_after_a_wrong_first_step(stage):
    start = time.perf_counter()
    with pytest.raises(execute.StepZero):
        stage("print({'rewards/margins': '3'}, flush=True); open('pid', 'w').write(str(os.getpid())); time.sleep(99)")
    assert time.perf_counter() - start < 30
    if Path("pid").exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int(Path("pid").read_text()), 0)


def test_orphans_of_a_killed_chain_are_ended(tmp_path):
    environment = os.environ | {execute.MARK: str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"], env=environment) as orphan:
        time.sleep(0.3)
        assert execute.end_orphans(tmp_path / "other") == 0
        assert execute.end_orphans(tmp_path) == 1
        assert orphan.poll() is not None


def test_history_counts_repeated_steps_once(tmp_path):
    rows = [{"loss": i, "epoch": i} for i in (1, 2, 3)] + [{"loss": 20, "epoch": 2}, {"loss": 30, "epoch": 3}]
    (tmp_path / "log.txt").write_text("\n".join(map(str, rows)))
    assert [row["loss"] for row in execute.history(tmp_path / "log.txt")] == [1, 20, 30]
    ending = [{"eval_loss": 3, "epoch": 3}, {"train_loss": 2, "epoch": 3}]  # a training that had come to its end
    (tmp_path / "log.txt").write_text("\n".join(map(str, [*rows, *ending, rows[-1], *ending])))
    assert execute.history(tmp_path / "log.txt") == [rows[0], *rows[-2:], *ending]


# The page


def test_page_is_self_contained_and_escaped(tmp_path):
    stage = plan.Stage("sft", "sft", tmp_path / "<b>&", {})
    stage.folder.mkdir()
    stage.log.write_text("\n".join(str({"loss": 3 - i, "qtarget/trust": "nan", "epoch": i}) for i in range(3)))
    text = page.write_page(tmp_path, [stage], {"sft": keys.Record("", metric="<script>")}).read_text()
    assert text.count("<polyline") == 1
    assert "loss: 3 to 1, between 1 and 3; epoch 0 to 2" in text
    assert "<script>" not in text
    assert "&lt;b&gt;&amp;" in text
    assert not re.search(r"https?:|src=|href=", text)
    HTMLParser().feed(text)


def test_an_evaluation_of_several_models_shows_each(tmp_path):
    stage = plan.Stage("eval", "eval", tmp_path, {})
    stage.output.mkdir()
    results = [{"k": 4, "average_at_k": x, "average_at_k_se": 0.01} for x in (0.15, 0.65)]
    (stage.output / "results.json").write_text(json.dumps({"results": results}))
    assert page.main_metric(stage) == "Average@4 15.0 +- 1.0, 65.0 +- 1.0"


# Merging an adapter


@pytest.fixture
def adapter(tmp_path, student_dir, tokenizer):
    """A folder as a LoRA stage leaves it, of an adapter that matters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(student_dir)
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    return model.eval()


def test_merge(tmp_path, adapter, tokenizer, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = ["merge", "--model_name_or_path", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]
    assert main(words) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(40)[None] % len(tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapter(ids).logits, atol=1e-4, rtol=1e-4)
        with adapter.disable_adapter():
            assert (merged(ids).logits - adapter(ids).logits).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template
    assert merged.generation_config.eos_token_id == 3
    assert execute.metrics(capsys.readouterr().out.splitlines())[0]["logit_difference"] < 1e-4
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_merge_keeps_the_type(tmp_path, adapter, dtype):
    from safetensors import safe_open

    words = ["merge", "--model_name_or_path", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]
    assert main([*words, "--dtype", dtype]) == 0
    with safe_open(tmp_path / "merged/model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {getattr(torch, dtype)}  # noqa: SIM118


def test_merge_writes_nothing_that_differs(tmp_path, adapter, monkeypatch, capsys):
    monkeypatch.setattr("peft.PeftModel.merge_and_unload", lambda self, **options: self.unload(), raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["merge", "--model_name_or_path", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")])
    assert stop.value.code == 2
    assert "The merged model's logits differ" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


# From end to end


SMALL = {
    "max_steps": 6,
    "save_steps": 1,
    "save_total_limit": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": 8,
}


def weights(root):
    from safetensors.torch import load_file

    return {name: load_file(root / name / "model/model.safetensors") for name in ("sft-merge", "dpo", "grpo")}


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["sft", "grpo"])
def test_a_killed_chain_ends_as_an_uninterrupted_one(chain, tmp_path, killed):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-m", "trl_qtarget", "chain", "--config"]
    changes = {"sft": {"learning_rate": 1e-2}, "grpo": {"beta": 0.1}}
    whole = chain({"output_dir": "whole", "defaults": CPU | SMALL}, **changes)
    assert subprocess.run([*call, whole], env=environment, check=False).returncode == 0
    config = chain({"output_dir": "runs", "defaults": CPU | SMALL}, **changes)
    with subprocess.Popen([*call, config], env=environment) as process:
        while process.poll() is None and not list(
            Path("runs").glob(f"{killed}/model/checkpoint-*/trainer_state.json")
        ):
            time.sleep(0.02)
        process.kill()
    assert keys.record(Path("runs", killed)).state == "running"
    assert subprocess.run([*call, config], env=environment, check=False).returncode == 0
    assert keys.record(Path("runs", killed)).attempts == 2
    torch.testing.assert_close(weights(Path("runs")), weights(Path("whole")), rtol=0, atol=0)
    start = time.perf_counter()
    assert subprocess.run([*call, config], env=environment, check=False).returncode == 0
    assert time.perf_counter() - start < 4  # seconds, one a stage, on a loaded machine too


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 2])
def test_killed_between_the_last_checkpoint_and_the_model(chain, limit):
    """Five steps of two an epoch: Trainer would take a sixth from the checkpoint of the fifth."""
    settings = CPU | SMALL | {"max_steps": 5, "save_total_limit": limit, "lr_scheduler_type": "constant"}
    chain({"defaults": settings}, sft={"use_peft": None, "learning_rate": 1e-2})
    call = [sys.executable, "-m", "trl_qtarget", "chain", "--config", "chain.yaml", "--to", "sft"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(call, env=environment, check=False).returncode == 0
    folder = Path("runs/sft")
    whole = (folder / "model/model.safetensors").read_bytes()
    steps = [row["loss"] for row in execute.history(folder / "log.txt") if "loss" in row]
    metric = keys.record(folder).metric
    for file in folder.glob("model/*"):
        if file.is_file():
            file.unlink()
    killed = keys.record(folder)
    killed.state = "running"
    killed.save(folder)
    assert subprocess.run(call, env=environment, check=False).returncode == 0
    assert (folder / "model/model.safetensors").read_bytes() == whole
    assert [row["loss"] for row in execute.history(folder / "log.txt") if "loss" in row] == steps
    assert len(steps) == 5
    assert keys.record(folder).metric == metric
