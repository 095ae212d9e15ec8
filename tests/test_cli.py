"""The command line: what it prints, what it refuses before anything is launched, and how a launch ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml

import trl_qtarget
from trl_qtarget.cli.main import main
from trl_qtarget.theory.presets import PRESETS


ROOT = Path(trl_qtarget.__file__).parents[1]
CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.fixture
def recipe(tmp_path, student_dir, teacher_dir, rows, monkeypatch):
    """`recipe(**changes)` writes the YAML file of a training with changes (None removes a key); returns its name."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows(8))))
    settings = {
        **CPU,
        "model_name_or_path": student_dir,
        "teacher_model_name_or_path": teacher_dir,
        "datasets": [{"path": "json", "data_files": "rows.jsonl"}],
        "output_dir": "out",
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "dtype": "float32",
    }

    def write(text="", **changes):
        left = {name: value for name, value in {**settings, **changes}.items() if value is not None}
        Path("recipe.yaml").write_text(yaml.safe_dump(left) + text)
        return "recipe.yaml"

    return write


@pytest.fixture
def launched(monkeypatch):
    """Launches are recorded, as (own words, accelerate's words), and not made."""
    calls = []
    monkeypatch.setattr(
        "trl_qtarget.options.launching.launch", lambda module, own, options, prog: calls.append((own, options)) or 0
    )
    return calls


@pytest.fixture
def refused(launched, capsys):
    """`refused(*words)` runs `sft`, which must exit with 2 and launch nothing; returns the lines on stderr."""

    def run(*words):
        with pytest.raises(SystemExit) as stop:
            main(["sft", *map(str, words)])
        assert stop.value.code == 2
        assert not launched
        said = capsys.readouterr().err.splitlines()
        assert all(line.startswith("trl-qtarget sft: ") for line in said)
        return [line.removeprefix("trl-qtarget sft: ") for line in said]

    return run


# Commands that need no torch


@pytest.mark.parametrize("words", [["--help"], ["losses"], ["losses", "eaft"], ["--version"]])
def test_quick_answers_import_no_torch(words):
    code = f"""import sys
from trl_qtarget.cli.main import main
try:
    main({words})
except SystemExit as stop:
    assert not stop.code
sys.exit('torch' in sys.modules)"""
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    """`completed(*words)` returns the completions that bash offers for the last of the words after trl-qtarget."""
    file = tmp_path_factory.mktemp("completion") / "trl-qtarget"
    with file.open("w") as text, redirect_stdout(text):
        assert main(["completion", "bash"]) == 0
    ask = (
        'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_trl_qtarget; printf "%s\\n" "${COMPREPLY[@]}"'
    )

    def offers(*words):
        call = ["bash", "-c", ask, str(file), "trl-qtarget", *words]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.split()

    return offers


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["c"], ["cache", "chain", "completion"]),
        (["vllm"], ["vllm-serve"]),
        (["sft", "--loss_"], ["--loss_type", "--loss_kwargs"]),
        (["sft", "--loss", "t"], ["target_sft", "talr"]),
        (["sft", "--loss", "dft", "--learn"], ["--learning_rate"]),  # one spelling of two
        (["sft", "--accelerate_config", "z"], ["zero1", "zero2", "zero3"]),
        (["grpo", "--reward_w"], ["--reward_weights"]),
        (["dpo", "--num_proc"], ["--num_processes"]),  # accelerate's
        (["losses", "ea"], ["eaft"]),
        (["chain", "--"], ["--help", "--config", "--dry_run", "--from", "--to"]),
    ],
)
def test_completion(completed, words, offered):
    assert sorted(completed(*words)) == sorted(offered)


def test_help_names_all_commands(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: trl-qtarget ")
    assert all(f"    {name} " in shown for name in ("sft", "losses", "eval", "dpo", "grpo", "kto", "vllm-serve"))


def test_version(capsys):
    assert main(["--version"]) == 0
    shown = capsys.readouterr().out
    assert f"trl-qtarget {trl_qtarget.__version__}\n" in shown
    assert all(f"\n{package} " in shown for package in ("trl", "transformers", "torch", "accelerate", "peft"))


def test_losses_are_a_line_each(capsys):
    assert main(["losses"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert all(PRESETS[line.split()[0]].paper in line for line in lines)


@pytest.mark.parametrize("name", PRESETS)
def test_one_loss(name, capsys):
    assert main(["losses", name]) == 0
    shown = capsys.readouterr().out
    assert f"trl-qtarget sft --loss {name}" in shown
    assert all(f"{argument} = " in shown for argument in PRESETS[name].defaults)
    assert PRESETS[name].formula.splitlines()[0] in shown


def test_one_loss_says_what_its_arguments_take(capsys):
    main(["losses", "eaft"])
    shown = capsys.readouterr().out
    assert "(0 <= alpha < inf)" in shown
    assert "k = 20    " in shown
    assert "https://huggingface.co/papers/2601.02151" in shown


def test_a_loss_of_ones_own(tmp_path, capsys):
    (tmp_path / "my_losses.py").write_text(
        "from trl_qtarget import Target\n\n"
        'def half(gamma: float = 0.5) -> Target:\n    """Half."""\n    return Target(trust=gamma)\n'
    )
    assert main(["losses", f"{tmp_path}/my_losses.py:half"]) == 0
    assert "gamma = 0.5" in capsys.readouterr().out


@pytest.mark.parametrize("loss", ["os:system", "subprocess:run", "builtins:exec"])
def test_a_text_in_a_recipe_never_calls_what_is_no_loss(loss, capsys):
    assert main(["losses", loss]) == 2
    assert "has no decorator @preset" in capsys.readouterr().err


def test_unknown_loss(capsys):
    assert main(["losses", "dtf"]) == 2
    assert "Unknown loss 'dtf'. Did you mean 'dft'?" in capsys.readouterr().err


# Commands of TRL


@pytest.mark.parametrize(("ended", "code"), [(3, 3), (-9, 137)])
def test_a_script_of_trl_that_fails_adds_no_traceback(monkeypatch, ended, code):
    def fails(argv):
        raise subprocess.CalledProcessError(ended, argv)

    monkeypatch.setattr("trl.cli.main", fails)
    assert main(["grpo", "--beta", "0"]) == code


def test_other_commands_are_trls(monkeypatch):
    seen = []
    monkeypatch.setattr("trl.cli.main", lambda argv: seen.append(argv) or 7)
    assert main(["dpo", "--config", "x.yaml", "--num_processes", "2"]) == 7
    assert seen == [["dpo", "--config", "x.yaml", "--num_processes", "2"]]


def test_without_trls_list_every_command_is_handed_over(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("trl.cli.main", lambda argv: seen.append(argv) or 0)
    monkeypatch.setitem(sys.modules, "trl.cli.commands", None)
    assert main(["grpo", "-h"]) == 0
    assert seen == [["grpo", "-h"]]
    assert main([]) == 0
    assert "losses" in capsys.readouterr().out


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sfft"])
    assert stop.value.code == 2
    assert "invalid choice: 'sfft'" in capsys.readouterr().err


# sft: words


def test_help_of_sft(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sft", "-h"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: trl-qtarget sft [--config FILE] [--OPTION VALUE ...]\n")
    assert "--max_steps" not in shown.partition("\noptions of trl sft:\n")[0]
    assert "--loss_kwargs" not in shown.partition("\noptions of trl sft:\n")[2]
    assert "--max-steps" not in shown
    words = "--loss --teacher_model_name_or_path --packing --lora_r --datasets --config --overwrite_output_dir"
    assert all(f"  {word} " in shown for word in words.split())
    assert "zero3" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--losss", "dft"], "unknown option '--losss' (did you mean '--loss'?)"),
        (["--max-seq-length=5"], "unknown option '--max-seq-length' (did you mean '--max_length'?)"),
        (["--torch_dtype", "bfloat16"], "unknown option '--torch_dtype' (did you mean '--dtype'?)"),
        (["--num_proceses", "2"], "unknown option '--num_proceses' (did you mean '--num_processes'?)"),
        (["--learning", "1"], "unknown option '--learning' (did you mean '--learning_rate'?)"),
        (["--zzz"], "unknown option '--zzz'"),
        (["--num_processes", "2", "extra"], "unexpected argument 'extra': every setting is given by name, see --help"),
        (["--num_processes", "two"], "argument --num_processes/--num-processes: invalid int value: 'two'"),
        (["--max_steps", "2.5"], "argument --max_steps/--max-steps: invalid int value: '2.5'"),
        (["--config", "nowhere.yaml"], "cannot read --config nowhere.yaml: No such file or directory"),
        (["--config", "a", "--config=b"], "--config is given 2 times, one file is read."),
    ],
)
def test_words_that_nobody_knows(refused, words, said):
    assert refused(*words) == [said]


def test_accelerate_config_is_a_file_or_a_name(refused):
    (said,) = refused("--accelerate_config", "zero9")
    assert "'zero9' is neither a file nor one of fsdp1, fsdp2" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("los_type: dft", "unknown key 'los_type' (did you mean 'loss'?)"),
        ("learning-rat: 1", "unknown key 'learning-rat' (did you mean 'learning_rate'?)"),
        ("overwrite_output: true", "unknown key 'overwrite_output' (did you mean 'overwrite_output_dir'?)"),
        ("num_machine: 1", "unknown key 'num_machine' (did you mean 'num_machines'?)"),
        ("config: other.yaml", "unknown key 'config' (did you mean 'fsdp_config'?)"),
        ("help: true", "unknown key 'help'"),
        ("1: 2", "unknown key '1'"),
        ("max_steps: 2.5", "max_steps must be a whole number, got 2.5"),
        ("max_steps: abc", "max_steps must be a whole number, got 'abc'"),
        ("max_steps: true", "max_steps must be a whole number, got True"),
        ("max_steps:", "max_steps must be a whole number, got None"),
        ("learning_rate: fast", "learning_rate must be a number, got 'fast'"),
        ("learning_rate: [1]", "learning_rate must be a number, got [1]"),
        ("packing: maybe", "packing must be true or false, got 'maybe'"),
        ("run_name: {a: 1}", "run_name must be text, got {'a': 1}"),
        ("trust_token_ids: [[1]]", "trust_token_ids must be text, got [1]"),
        ("dataset_kwargs: [1]", "dataset_kwargs must be text or a mapping, got [1]"),
        ("save_strategy: sometimes", "save_strategy must be one of no, steps, epoch, best, got 'sometimes'"),
        ("truncation_mode: keep", "truncation_mode must be one of keep_end, keep_start, got 'keep'"),
        ("multi_gpu: maybe", "multi_gpu must be true or false, got 'maybe'"),
        ("num_processes: [2]", "num_processes must be one value"),
        ("env: 3", "env must be a mapping, got 3"),
        ("datasets: trl-lib/tldr", "datasets must be a list of mappings, got 'trl-lib/tldr'"),
        ("datasets: [{pth: json}]", "datasets has an entry with an unknown key 'pth' (did you mean 'path'?)"),
        ("datasets: [{name: x}]", "datasets has an entry without 'path'"),
        ("max_steps: 1\nmax-steps: 2", "max-steps is set twice"),
    ],
)
def test_keys_and_values_of_a_file(refused, tmp_path, text, said):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    assert refused("--config", file) == [f"{file}: {said}"]


def test_all_mistakes_of_a_file_at_once(refused, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("los: dft\nloss: dft\nmax_steps: x\npacking: maybe\n")
    assert [line.split(": ")[1].split()[0] for line in refused("--config", file)] == [
        "unknown",
        "max_steps",
        "packing",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "must hold settings as `name: value` lines"),
        ("", "must hold settings as `name: value` lines"),
        ("a: [1\nb: 2\n", "is not plain YAML: expected ',' or ']', but got ':' in line 2"),
        ("loss: !!python/object/apply:os.getcwd []", "is not plain YAML: could not determine a constructor"),
        ("max_steps: 1\nloss: dft\nmax_steps: 2\n", "sets max_steps twice"),
        ("run_name: \x00", "is not plain YAML: "),
    ],
)
def test_files_that_are_no_settings(refused, tmp_path, text, said):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    (line,) = refused("--config", file)
    assert line.startswith(f"{file} {said}")


def parse(tmp_path, text, *words):
    from trl_qtarget.scripts.sft import make_parser

    file = tmp_path / "recipe.yaml"
    file.write_text(text + "\nuse_cpu: true\nbf16: false\n")
    return make_parser().parse(["--config", str(file), *words])


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 1e-3", "learning_rate", 0.001),
        ("learning-rate: 5", "learning_rate", 5.0),
        ("max_steps: '7'", "max_steps", 7),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("packing: on", "packing", True),
        ("packing: 'yes'", "packing", True),
        ("max_length: null", "max_length", None),
        ("max_length: none", "max_length", None),
        ("model_revision: 0123", "model_revision", "0123"),
        ("run_name: 2024-01-02", "run_name", "2024-01-02"),
        ("trust_token_ids: [5, special]", "trust_token_ids", ["5", "special"]),
        ("trust_token_ids: special", "trust_token_ids", ["special"]),
        ("lora_target_modules: all-linear", "lora_target_modules", "all-linear"),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", True),
        ("loss_kwargs: {eta: 0.25}", "loss_kwargs", {"eta": 0.25}),
        ("loss_kwargs: '{\"eta\": 0.25}'", "loss_kwargs", {"eta": 0.25}),
        (
            "base: &x {eta: 1}\n".replace("base", "loss_kwargs") + "teacher_model_init_kwargs: *x",
            "loss_kwargs",
            {"eta": 1},
        ),
    ],
)
def test_values_are_read_by_the_type_of_the_option(tmp_path, text, name, value):
    parsed = parse(tmp_path, text)
    (made,) = (getattr(part, name) for part in parsed.values if hasattr(part, name))
    assert made == value
    assert type(made) is type(value) or isinstance(made, str)
    assert parsed.sources[name].endswith("recipe.yaml")


def test_command_line_comes_before_the_file(tmp_path):
    parsed = parse(tmp_path, "max_steps: 3\nlearning_rate: 1e-3", "--max_steps", "4")
    assert (parsed.values[1].max_steps, parsed.values[1].learning_rate) == (4, 1e-3)
    assert parsed.sources["max_steps"] == "command line"
    assert "per_device_train_batch_size" not in parsed.sources


def test_env_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("QTARGET_TEST", "before")
    parse(tmp_path, "env: {QTARGET_TEST: 3}")
    assert os.environ["QTARGET_TEST"] == "3"


# sft: before the launch


def test_launches_with_accelerates_words_apart(recipe, launched):
    words = ["--config", recipe(num_processes=2, main_process_port=123, multi_gpu=True, same_network=False)]
    words += ["--max_steps", "2", "--mixed-precision", "no", "--loss", "target_sft", "--accelerate_config", "zero2"]
    assert main(["sft", *words]) == 0
    ((own, options),) = launched
    assert own == ["--config", "recipe.yaml", "--max_steps", "2", "--loss", "target_sft"]
    assert sorted(options[:3]) == ["--main_process_port=123", "--multi_gpu", "--num_processes=2"]
    assert options[3:] == ["--mixed-precision", "no", "--accelerate_config", "zero2"]


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({"loss": "dtf"}, [], "Unknown loss 'dtf'. Did you mean 'dft'?"),
        ({"loss_kwargs": {"beta": 1}}, [], "Loss 'target_sft' takes eta, not beta."),
        ({"loss_kwargs": 3}, [], "loss_kwargs must be a mapping"),
        ({}, ["--loss_type", "target_sft"], "loss_type='target_sft' is TRL's own option"),
        ({"teacher_model_name_or_path": None}, [], "loss 'target_sft' needs a teacher: pass --teacher_model_name_or"),
        ({"teacher_model_name_or_path": "./no"}, [], "teacher_model_name_or_path: there is no folder ./no"),
        ({"model_name_or_path": None}, [], "no model: pass --model_name_or_path"),
        ({"model_name_or_path": "a/b/c"}, [], "model_name_or_path: there is no folder a/b/c"),
        ({"model_name_or_path": "."}, [], "model_name_or_path: the folder . holds no model (no config.json)"),
        ({"datasets": None}, [], "no data: pass --dataset_name, or list `datasets` in the YAML file"),
        ({"resume_from_checkpoint": True}, [], "resume_from_checkpoint: output_dir out holds no checkpoint"),
        ({}, ["--resume_from_checkpoint", "x"], "resume_from_checkpoint: x is no checkpoint (no trainer_state.json)"),
    ],
)
def test_mistakes_that_would_show_late(recipe, refused, changes, words, said):
    (line,) = refused("--config", recipe(**changes), *words)
    assert line.startswith(said)


def test_names_of_the_hub_are_not_taken_for_folders(recipe, launched):
    assert main(["sft", "--config", recipe(model_name_or_path="owner/name", loss="dft")]) == 0
    assert launched


@pytest.mark.parametrize("names", [["config.json", "model.safetensors"], ["adapter_config.json", "adapter_model.bin"]])
def test_finished_models_are_not_overwritten(recipe, refused, launched, names):
    config = recipe()
    Path("out/checkpoint-1").mkdir(parents=True)
    for name in ("trainer_state.json", "optimizer.pt"):
        Path("out/checkpoint-1", name).write_text("{}")
    for name in names:
        Path("out", name).write_text("{}")
    (line,) = refused("--config", config)
    assert line.startswith("output_dir out holds a finished model: give another --output_dir")
    for words in (["--overwrite_output_dir"], ["--resume_from_checkpoint", "true"], ["--output_dir", "out2"]):
        assert main(["sft", "--config", config, *words]) == 0
    assert len(launched) == 3


def test_print_config(recipe, launched, capsys):
    config = recipe(hub_token="hf_secret", model_init_kwargs={"token": "hush"}, loss_kwargs={"eta": 0.25})
    assert main(["sft", "--config", config, "--print_config", "--max_steps", "9", "--num_processes", "2"]) == 0
    shown = capsys.readouterr().out
    rows = {name: rest for name, *rest in (re.split(r"\s{2,}", line.strip()) for line in shown.splitlines())}
    assert not launched
    assert rows["max_steps"] == ["9", "command line"]
    assert rows["output_dir"] == ["out", "recipe.yaml"]
    assert rows["loss"] == ["target_sft", "default"]
    assert rows["loss_kwargs.eta"] == ["0.25", "recipe.yaml"]
    assert rows["hub_token"] == ["***", "recipe.yaml"]
    assert "--num_processes 2" in shown
    assert "hush" not in shown
    assert "secret" not in shown
    assert "warmup_steps" not in shown


def test_a_token_in_an_error_is_masked(refused, recipe):
    token = "hf_" + "a1B2" * 8
    (line,) = refused("--config", recipe(), "--max_steps", token)
    assert token not in line
    assert "'***'" in line


def test_print_config_of_a_cache(recipe, launched, capsys):
    assert main(["cache", "--config", recipe(), "--print_config", "--top_k", "8"]) == 0
    shown = capsys.readouterr().out
    assert not launched
    assert re.search(r"top_k +8 +command line", shown)


# The launch


@pytest.fixture
def ends(tmp_path, monkeypatch):
    """`ends(code)` launches a module of these lines as the script, and returns the exit code."""
    from trl_qtarget.options.launching import launch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(code, *words, options=("--num_processes", "1")):
        Path("tiny_script.py").write_text("import os, sys, time\n" + code)
        return launch("tiny_script", list(words), list(options), "trl-qtarget sft")

    return run


@pytest.mark.parametrize(
    ("code", "ended"),
    [
        ("pass", 0),
        ("sys.exit(2)", 2),
        ("raise IndexError('real')", 1),
        ("os.kill(os.getpid(), 9)", 137),
        ("sys.exit(sys.argv[1:] != ['--config', 'x.yaml', '--num_processes'])", 0),
    ],
)
def test_exit_code_is_the_scripts(ends, code, ended, capfd):
    assert ends(code, "--config", "x.yaml", "--num_processes") == ended
    said = capfd.readouterr().err
    assert "CalledProcessError" not in said
    assert ("IndexError: real" in said) == ("IndexError" in code)


def test_accelerates_advice_on_defaults_is_not_shown(ends, capfd):
    assert ends("pass", options=()) == 0
    assert "were not passed" not in capfd.readouterr().err


def test_mistakes_in_accelerates_options(ends, capsys):
    with pytest.raises(SystemExit) as stop:
        ends("pass", options=("--cpu", "--multi_gpu"))
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("trl-qtarget sft: You can only use one of `--cpu`, `--multi_gpu`")
    with pytest.raises(SystemExit):
        ends("pass", options=("--config_file", "nowhere.yaml"))
    assert "`nowhere.yaml` does not exist" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "ended"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_launcher_ends_its_children(ends, tmp_path, number, ended):
    """The launcher runs in its own process and session, so that the signal reaches it and not the script."""
    (tmp_path / "tiny_script.py").write_text(
        "import os, time\nopen('pid.part', 'w').write(str(os.getpid()))\nos.rename('pid.part', 'pid')\ntime.sleep(99)"
    )
    code = "import sys; from trl_qtarget.options.launching import launch; sys.exit(launch('tiny_script', [], [], 'x'))"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    with subprocess.Popen([sys.executable, "-c", code], env=env, start_new_session=True) as launcher:
        for _ in range(600):
            if (tmp_path / "pid").exists():
                break
            time.sleep(0.1)
        script = int((tmp_path / "pid").read_text())
        launcher.send_signal(number)
        assert launcher.wait(30) == ended
    with pytest.raises(ProcessLookupError):
        os.kill(script, 0)


def test_ranks_do_not_repeat_a_mistake(monkeypatch, capsys):
    from trl_qtarget.options import parsing

    waited = []
    monkeypatch.setattr(parsing.time, "sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            parsing.fail("x", "wrong\n   way")
    assert waited == [10]
    assert capsys.readouterr().err == "x: wrong way\n" * 2


# From end to end


@pytest.fixture
def train(recipe, monkeypatch, capfd):
    """`train(*words, **changes)` runs `sft` to its end; returns its exit code and its output."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(*words, **changes):
        code = main(["sft", "--config", recipe(**changes), *words])
        shown = capfd.readouterr()
        return code, shown.out + shown.err

    return run


@pytest.mark.slow
def test_trains(train):
    code, shown = train("--loss", "target_sft")
    assert code == 0, shown
    assert shown.count("qtarget/trust") == 2
    assert "Model saved to out." in shown
    assert Path("out/model.safetensors").is_file()
    with pytest.raises(SystemExit):
        train()


@pytest.mark.slow
def test_mistake_found_by_the_script_is_a_sentence(train):
    code, shown = train(eval_strategy="steps")
    assert code == 2
    assert "trl-qtarget sft: The data has no split 'test', it has 'train': pass --dataset_test_split" in shown
    assert "Traceback" not in shown


@pytest.mark.slow
def test_crash_keeps_its_traceback(train):
    Path("my_losses.py").write_text(
        "from trl_qtarget import Target\ndef boom() -> Target:\n    def f(t):\n        raise IndexError('boom')\n"
        "    return Target(trust=f)\n"
    )
    code, shown = train(loss="my_losses:boom", teacher_model_name_or_path=None)
    assert code == 1
    assert "IndexError: boom" in shown
    assert "CalledProcessError" not in shown


@pytest.mark.distributed
def test_two_processes(train):
    code, shown = train(num_processes=2, multi_gpu=True)
    assert code == 0, shown
    assert shown.count("Model saved to out.") == 1
    code, shown = train(num_processes=2, multi_gpu=True, output_dir="other", eval_strategy="steps")
    assert code == 2
    assert shown.count("The data has no split 'test'") == 1
