"""The memory of a step, on paper: the arithmetic by hand, what it advises, and `trl-qtarget plan`."""

import json
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig

import trl_qtarget
from trl_qtarget import ProjectedLogits, build, qtarget_loss
from trl_qtarget.cli.main import main
from trl_qtarget.compat import prepare_frozen
from trl_qtarget.loss.scratch import KEPT
from trl_qtarget.options.launching import launched_as
from trl_qtarget.planning.advice import advise
from trl_qtarget.planning.memory import parts, peak, totals
from trl_qtarget.planning.run import Engine, Run, Size, Teacher
from trl_qtarget.planning.sizes import adapted, run_of, size_of
from trl_qtarget.scripts import plan


ROOT = Path(trl_qtarget.__file__).parents[1]
N, V, D = 1_000_000, 2_000, 100
STUDENT = Size(
    frozen=0, trained=N, linear=N - 2 * V * D, rows=V, width=D, layers=4, inner=1_000, frozen_bytes=0, itemsize=4
)  # fmt: skip
TAUGHT = Size(
    frozen=0, trained=3 * N, linear=2 * N, rows=V, width=2 * D, layers=4, inner=2_000, frozen_bytes=0, itemsize=2
)  # fmt: skip
TEACHER = Teacher(TAUGHT, weights=6 * N, itemsize=2)
PLAIN = Run(STUDENT, rows=4, row_tokens=64, half=False, checkpointing=False, device="cpu")


KNOWS_NOT = "PEFT does not know where to put adapters in "


def part(run, name):
    return next((p for p in parts(run) if p.name == name), None)


# The arithmetic


@pytest.mark.parametrize(
    ("engine", "half", "expected"),
    [
        (Engine(), False, (4 * N, 4 * N, 8 * N)),
        (Engine("DDP", 4), True, (4 * N, 4 * N, 8 * N)),
        (Engine("ZeRO-1", 4), True, (2 * N, 2 * N, 3 * N)),
        (Engine("ZeRO-2", 4), True, (2 * N, N / 2, 3 * N)),
        (Engine("ZeRO-3", 4), True, (N / 2, N / 2, 3 * N)),
        (Engine("FSDP", 4), True, (N, N, 2 * N)),
        (Engine("ZeRO-3", 4, offloads_weights=True), True, (0, N / 2, 3 * N)),
        (Engine("ZeRO-2", 4, offloads_states=True), True, (2 * N, N / 2, 0)),
    ],
)
def test_what_an_engine_leaves_of_weights_gradients_and_state(engine, half, expected):
    run = replace(PLAIN, engine=engine, half=half, device="cuda")
    found = [part(run, name) for name in ("weights", "gradients", "optimizer state")]
    assert tuple(p.update if p else 0 for p in found) == expected


def test_gradients_of_micro_batches_before_are_there_in_the_next():
    assert part(PLAIN, "gradients").loss == 0
    assert part(replace(PLAIN, accumulation=2), "gradients").loss == 4 * N


def test_fsdp_keeps_gradients_whole_until_the_last_micro_batch():
    run = replace(PLAIN, engine=Engine("FSDP", 4), half=True, accumulation=2)
    p = part(run, "gradients")
    assert (p.loss, p.update, p.estimated) == (2 * N, 2 * N, True)
    assert part(replace(run, half=False), "gradients").loss == 4 * N
    assert part(replace(run, engine=Engine("ZeRO-3", 4)), "gradients").loss == N / 2


def test_the_heads_gradient_is_float32_and_waits_for_the_embeddings():
    assert [part(PLAIN, "head: gradient").loss, part(PLAIN, "head: gradient").update] == [4 * V * D, 0]
    tied = replace(PLAIN, student=replace(STUDENT, tied=True))
    assert part(tied, "head: gradient").update == 4 * V * D
    zero = replace(tied, engine=Engine("ZeRO-2", 2), half=True)
    assert part(zero, "head: gradient").loss == (4 + 2) * V * D  # cast once, to what the head is trained in
    assert part(replace(PLAIN, student=replace(STUDENT, head_trained=False)), "head: gradient") is None


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 16])
def test_the_tile_is_the_one_that_the_loss_allocates(dense, chunk_size):
    KEPT.buffers.clear()
    hidden, weight = torch.randn(256, D, requires_grad=True), torch.randn(V, D)
    teacher = ProjectedLogits(torch.randn(256, 2 * D), torch.randn(V, 2 * D)) if dense else None
    target = build("target_sft" if dense else "dft")
    qtarget_loss(hidden, weight, torch.randint(V, (256,)), target, teacher=teacher, chunk_size=chunk_size)
    kept = sum(buffer.nbytes for (name, _), buffer in KEPT.buffers.items() if name in ("student", "teacher"))
    run = replace(PLAIN, chunk_size=chunk_size, teacher=TEACHER if dense else None)
    assert part(run, "head: tile of logits").loss == kept > 0


def test_teacher_weights_at_each_moment():
    def held(**changes):
        p = part(replace(PLAIN, **changes), "teacher: weights")
        return p and (p.teacher, p.loss, p.update)

    assert held(teacher=TEACHER) == (6 * N,) * 3
    assert held(teacher=replace(TEACHER, offloaded=True)) == (6 * N, V * 2 * D * 2, 0)  # the head is read in the loss
    assert held(teacher=TEACHER, engine=Engine("FSDP", 3)) == (2 * N,) * 3
    assert held(teacher=TEACHER, engine=Engine("ZeRO-2", 3)) == (6 * N,) * 3
    assert held(cached_ids=64) is None
    within = replace(TEACHER, weights=0, stands_apart=False)
    assert held(teacher=within) is None
    one = replace(TEACHER, rows=1)
    work = [part(replace(PLAIN, teacher=t), "teacher: a layer at work").teacher for t in (TEACHER, one)]
    assert work[0] == 4 * work[1]


def test_estimated_parts_are_marked():
    half = replace(PLAIN, half=True, engine=Engine("FSDP", 2), device="cuda", teacher=TEACHER)
    estimated = {p.name for p in parts(half) if p.estimated}
    assert estimated == {
        "teacher: a layer at work", "activations", "hidden states at the head", "weights in half precision",
        "gathered weights", "context and allocator",
    }  # fmt: skip
    assert part(replace(PLAIN, engine=Engine("DDP", 2)), "engine's buffers").update == 4 * N


def test_the_page_counts_a_model_as_the_plan_does():
    config = Qwen2Config(
        vocab_size=640, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    made = runpy.run_path(str(ROOT / "recipes/accelerate/cost.py"))
    assert made["qwen"](64, 2, 96, 4, 2, rows=640) == size_of(Qwen2ForCausalLM(config), itemsize=2)


@pytest.mark.parametrize(
    ("engine", "accumulation", "expected"),
    [
        ("DDP", 1, 20), ("DDP", 2, 22), ("ZeRO-2", 2, 2 + 18 / 8), ("ZeRO-3", 2, 20 / 8),
        ("FSDP", 1, 16 / 8), ("FSDP", 2, 2 + 12 / 8),
    ],
)  # fmt: skip
def test_bytes_a_parameter_are_those_of_the_page(engine, accumulation, expected):
    n = 10**13  # beside which nothing else counts
    student = replace(STUDENT, trained=n, linear=n)
    found = parts(replace(PLAIN, student=student, engine=Engine(engine, 8), accumulation=accumulation, half=True,
                          checkpointing=True))  # fmt: skip
    held = [p for p in found if p.name != "gathered weights"]
    assert max(sum(getattr(p, m) for p in held) for m in ("loss", "update")) / n == pytest.approx(expected, rel=1e-3)


# What to change


def test_advice_is_in_order_and_says_what_the_arithmetic_says():
    run = replace(PLAIN, teacher=replace(TEACHER, itemsize=4, weights=12 * N), device="cuda", half=True)
    run = replace(run, with_lora=replace(STUDENT, frozen=N, trained=1_000, frozen_bytes=4 * N, head_trained=False))
    limit = 2**30 + 2 * N
    found = advise(run, limit)
    names = [advice.change for advice in found]
    order = [
        "gradient_checkpointing", "teacher_cache", "teacher_model_init_kwargs", "teacher_offload",
        "per_device_train_batch_size", "qtarget_chunk_size", "use_peft",
    ]  # fmt: skip
    assert [n.partition(":")[0] for n in names] == order
    assert found[0].saves == peak(run) - peak(replace(run, checkpointing=True))
    assert found[1].left == peak(replace(run, checkpointing=True, teacher=None, cached_ids=64))
    left = [advice.left for advice in found if advice.left is not None]
    assert left == sorted(left, reverse=True)
    assert all(advice.saves > 0 for advice in found)
    assert advise(run, 2**40)[0].left is None  # it fits as it is


def test_what_trains_the_same_is_advised_before_lora_and_that_before_more_devices():
    full = replace(STUDENT, trained=10**10)
    lora = replace(full, frozen=10**10, trained=1_000, frozen_bytes=4 * 10**10, head_trained=False)
    run = replace(PLAIN, student=full, engine=Engine("DDP", 4), rows=1, half=True, with_lora=lora)
    names = [advice.change for advice in advise(run, 0)]
    shared, adapters, more = (
        next(i for i, n in enumerate(names) if n.startswith(start))
        for start in ("ZeRO-3 (or FSDP2) on 4 devices", "use_peft", "ZeRO-3 (or FSDP2) on 1024")
    )
    assert shared < adapters < more


def test_fsdp_is_left_for_zero3_where_it_would_keep_gradients_whole():
    run = replace(PLAIN, engine=Engine("FSDP", 8), student=replace(STUDENT, trained=10**10), rows=1, half=True)
    for accumulation, change in ((1, "FSDP on 1024 devices"), (2, "ZeRO-3 on 8 devices")):
        names = [advice.change for advice in advise(replace(run, accumulation=accumulation), 0)]
        assert next(n for n in names if n.endswith("devices")) == change


def test_what_an_engine_or_a_teacher_does_not_allow_is_not_advised():
    sharded = replace(PLAIN, engine=Engine("FSDP", 2), teacher=replace(TEACHER, is_reference=True), device="cuda")
    changes = " ".join(advice.change for advice in advise(sharded, 0))
    assert "teacher_offload" not in changes
    assert "teacher_cache" not in changes
    remembered = replace(PLAIN, teacher=replace(TEACHER, stands_apart=False), device="cuda")
    assert "devices" not in " ".join(advice.change for advice in advise(remembered, 0))


# From a recipe


@pytest.fixture
def recipe(tmp_path, student_dir, teacher_dir):
    """`recipe(**changes)` writes a YAML file (None removes a key); the models are configurations without weights."""
    for folder in (student_dir, teacher_dir):
        bare = tmp_path / Path(folder).name
        bare.mkdir()
        (bare / "config.json").write_text(Path(folder, "config.json").read_text())
    settings = {
        "model_name_or_path": str(tmp_path / Path(student_dir).name), "bf16": False, "report_to": "none",
        "teacher_model_name_or_path": str(tmp_path / Path(teacher_dir).name), "max_length": 64,
        "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "out"), "use_cpu": True,
    }  # fmt: skip

    def write(**changes):
        left = {name: value for name, value in {**settings, **changes}.items() if value is not None}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(left))
        return str(tmp_path / "recipe.yaml")

    return write


@pytest.fixture
def counted(recipe):
    """`counted(**changes)`: the run that a recipe makes."""

    def read(**changes):
        parsed = plan.make_parser().parse(["--config", recipe(**changes)])
        engine = plan.engine_of(launched_as(parsed.launch), parsed.values[1])
        return adapted(run_of(*parsed.values, engine=engine), *parsed.values)

    return read


def test_models_are_counted_as_they_are(counted, tiny_model):
    run, model = counted(), tiny_model()
    numbers = sum(p.numel() for p in model.parameters())
    s = run.student
    assert (s.frozen, s.trained, s.rows, s.width, s.layers, s.tied) == (0, numbers, 640, 32, 2, True)
    assert s.linear == sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    taught = sum(p.numel() for p in tiny_model(hidden=48, tie=False).parameters())
    assert run.teacher.weights == 4 * taught
    assert (run.tokens, run.dense, run.device, run.teacher.size.tied) == (256, True, "cpu", False)


def test_adapters_are_counted_as_peft_makes_them(counted, recipe, tiny_model):
    wanted = get_peft_model(tiny_model(), LoraConfig(r=8, target_modules="all-linear")).get_nb_trainable_parameters()
    for used in (True, False):  # or as they would be
        run = counted(use_peft=used or None, lora_r=8, lora_target_modules="all-linear", dtype="bfloat16")
        lora = run.student if used else run.with_lora
        assert (lora.trained, lora.parameters) == wanted
        assert (lora.frozen_bytes, lora.itemsize, lora.head_trained) == (2 * lora.frozen, 4, False)
    untied = yaml.safe_load(Path(recipe()).read_text())["teacher_model_name_or_path"]
    saved = counted(
        model_name_or_path=untied, use_peft=True, lora_target_modules="all-linear", lora_modules_to_save=["lm_head"]
    ).student
    assert saved.head_trained
    assert saved.trained > 640 * 48


def test_second_models_are_what_the_trainer_would_make(counted):
    none = {"teacher_model_name_or_path": None}
    assert counted(loss="dft").teacher is None
    copy = counted(loss="asft", **none)
    assert copy.teacher.weights == 4 * copy.student.trained
    assert copy.teacher.is_reference
    off = counted(loss="asft", use_peft=True, lora_target_modules="all-linear", **none).teacher
    assert (off.weights, off.stands_apart) == (0, False)
    average = counted(teacher_ema_decay=0.9, dtype="bfloat16", **none)
    assert average.teacher.weights == 4 * average.student.trained
    snapshot = counted(loss="psft", dtype="bfloat16", **none)
    assert (snapshot.teacher.weights, snapshot.dense) == (2 * snapshot.student.trained, False)
    assert counted(bf16=True).teacher.itemsize == 2
    assert counted(teacher_model_init_kwargs={"dtype": "bfloat16"}).teacher.itemsize == 2
    cached = counted(teacher_cache="owner/cache")
    assert (cached.teacher, cached.cached_ids) == (None, 64)


def test_an_adapter_of_the_students_base_counts_alone(counted, recipe, tmp_path):
    names = yaml.safe_load(Path(recipe()).read_text())
    found = {}
    for base in ("model_name_or_path", "teacher_model_name_or_path"):
        config = LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path=names[base])
        config.save_pretrained(tmp_path / "adapter")
        adapted = {"use_peft": True, "lora_target_modules": "all-linear"}
        found[base] = counted(**adapted, teacher_model_name_or_path=str(tmp_path / "adapter")).teacher
    own, other = found.values()
    assert (own.weights, own.stands_apart) == (4 * 2 * 4 * (32 + 32), False)  # two layers, A and B of a square q_proj
    assert (other.weights, other.stands_apart) == (counted().teacher.weights, True)  # merged into a base of its own


@pytest.mark.parametrize(
    ("profile", "engine"),
    [
        ("single", Engine()), ("ddp", Engine("DDP", 8)), ("zero2", Engine("ZeRO-2", 8)),
        ("zero3", Engine("ZeRO-3", 8)), ("fsdp2", Engine("FSDP", 8)), ("multi_node", Engine("ZeRO-3", 16)),
    ],
)  # fmt: skip
def test_engines_are_those_of_the_profiles(counted, profile, engine):
    assert counted(accelerate_config=str(ROOT / f"recipes/accelerate/{profile}.yaml")).engine == engine


def test_a_deepspeed_file_is_read(counted, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    found = counted(use_deepspeed=True, deepspeed_config_file=str(file), num_processes=4).engine
    assert found == Engine("ZeRO-2", 4, offloads_states=True)


@pytest.mark.parametrize(
    "zero", [{"stage": 3, "offload_param": None}, {"stage": "3"}, {"stage": "auto"}, {"offload_param": {}}, None]
)
def test_a_deepspeed_file_may_leave_things_open(counted, tmp_path, zero):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    found = counted(use_deepspeed=True, deepspeed_config_file=str(file), num_processes=4, zero_stage=3).engine
    assert found == Engine("ZeRO-3", 4)


# The command


def test_plan_says_what_each_part_takes(recipe, counted, capsys):
    assert main(["plan", "--config", recipe()]) == 0
    said = capsys.readouterr().out
    assert "~ activations" in said
    assert "  teacher: weights" in said or "\nteacher: weights" in said
    assert "--device_memory 80" in said
    (shown,) = re.findall(r"Peak: ([\d.]+) MiB", said)  # GiB would show none of its parts
    assert float(shown) == pytest.approx(max(totals(counted()).values()) / 2**20, abs=0.01)
    assert re.search(r"\nweights +0\.[1-9]", said)


def test_plan_needs_no_gpu_to_plan_for_one(recipe, capsys):
    assert main(["plan", "--config", recipe(use_cpu=None, bf16=True), "--device_memory", "80"]) == 0
    said = capsys.readouterr().out
    assert "context and allocator" in said
    assert "it fits" in said


def test_plan_advises_where_it_does_not_fit(recipe, capsys):
    file = recipe(gradient_checkpointing=False, lora_target_modules="all-linear")
    assert main(["plan", "--config", file, "--device_memory", "0.001", "--num_processes", "2"]) == 1
    said = capsys.readouterr().out
    assert "DDP, 2 device(s)" in said
    assert "too much" in said
    assert said.index("gradient_checkpointing: true") < said.index("teacher_cache") < said.index("use_peft: true")


def test_plan_advises_where_peft_does_not_know_the_architecture(recipe, capsys, tmp_path):
    Qwen3MoeConfig(
        vocab_size=640, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        moe_intermediate_size=16, num_experts=4, architectures=["Qwen3MoeForCausalLM"],
    ).save_pretrained(tmp_path / "moe")  # fmt: skip
    file = recipe(model_name_or_path=str(tmp_path / "moe"), gradient_checkpointing=False)
    assert main(["plan", "--config", file, "--device_memory", "0.001"]) == 1
    said = capsys.readouterr().out
    assert "gradient_checkpointing: true" in said
    assert "use_peft" not in said


@pytest.mark.parametrize(
    ("config", "words", "said"),
    [
        ({"model_type": "xglm", "architectures": ["XGLMForCausalLM"]}, ["--use_peft", "true"], KNOWS_NOT),
        ({"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}, ["--use_peft", "true"], KNOWS_NOT),
        (
            {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
            ["--use_peft", "true", "--lora_target_modules", "all-linear"],
            "PEFT cannot put these adapters on MambaForCausalLM ([PEFT",
        ),
        (
            {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
            [],
            "the plan has no formula for the layers of MambaForCausalLM, whose configuration has no attention heads",
        ),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, [], "is a BertForMaskedLM, which is no causal"),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, [], "is a ViTForImageClassification"),
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 7},
            [],
            "",
        ),
        ({"model_type": "no_such_type"}, [], "the configuration of "),
    ],
)
def test_plan_says_what_it_cannot_count(recipe, capsys, tmp_path, config, words, said):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    file = recipe(model_name_or_path=str(tmp_path / "other"), teacher_model_name_or_path=None, loss="dft")
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--config", file, *words])
    assert stop.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-qtarget"))
    assert line.removeprefix("trl-qtarget plan: ").removeprefix(f"'{tmp_path}/other' ").startswith(said)
    if config.get("num_attention_heads"):  # transformers 5 finds it in the configuration, 4 as the model is made
        assert "the configuration of" in line
        assert "heads" in line


def test_plan_without_peft(recipe, tmp_path, monkeypatch, capsys):
    """It advises no adapters, and says what is missing where a recipe has some."""
    code = (
        "import sys; sys.modules['peft'] = None; from trl_qtarget.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["plan", "--config", recipe(gradient_checkpointing=False), "--device_memory", "0.001"]
    run = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stderr
    assert "gradient_checkpointing: true" in run.stdout
    assert "use_peft" not in run.stdout
    monkeypatch.setitem(sys.modules, "peft", None)
    LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path="x").save_pretrained(tmp_path / "adapter")
    for changes, said in (
        ({"use_peft": True}, "use_peft: the package peft is not installed: pip install peft."),
        (
            {"teacher_model_name_or_path": str(tmp_path / "adapter")},
            f"{tmp_path}/adapter is an adapter, and the package peft",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["plan", "--config", recipe(**changes)])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


def test_plan_needs_no_cache_to_plan_with_one(recipe, capsys, tmp_path):
    folder = tmp_path / "runs" / "cache"
    file = recipe(teacher_cache=str(folder))
    assert main(["plan", "--config", file]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "is not here: counted with K = 64 ids a label" in said
    folder.mkdir(parents=True)
    with pytest.raises(SystemExit):
        main(["plan", "--config", file])
    assert "holds no cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"zero_optimization": {"stage": "x"}}, "zero_optimization.stage must be 0, 1, 2 or 3, got 'x'."),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage must be 0, 1, 2 or 3, got 4."),
        ({"zero_optimization": {"offload_param": "cpu"}}, "offload_param must be an object {...}, got 'cpu'."),
        (["stage"], "must be an object {...}, got ['stage']."),
    ],
)
def test_plan_names_file_and_key_that_deepspeed_would_not_take(recipe, capsys, tmp_path, content, said):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--config", recipe(), "--use_deepspeed", "--deepspeed_config_file", str(file)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"trl-qtarget plan: DeepSpeed's configuration {file}")
    assert line.endswith(said)


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({"model_name_or_path": "nobody/nothing"}, [], "the configuration of 'nobody/nothing' cannot be read"),
        ({"teacher_model_name_or_path": "nobody/nothing"}, [], "the configuration of 'nobody/nothing' cannot be read"),
        ({"teacher_model_name_or_path": None}, [], "loss 'target_sft' needs a teacher"),
        ({"model_name_or_path": "./no"}, [], "model_name_or_path: there is no folder ./no"),
        ({}, ["--max_length", "none"], "max_length is not set, so nothing says how long a row is"),
        ({}, ["--device_memory", "0"], "device_memory must be more than 0"),
        ({}, ["--devise_memory", "80"], "unknown option '--devise_memory' (did you mean '--device_memory'?)"),
        ({}, ["--use_deepspeed", "--deepspeed_config_file", "no.json"], "DeepSpeed's configuration no.json cannot"),
    ],
)
def test_plan_refuses_in_a_sentence(recipe, capsys, changes, words, said):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--config", recipe(**changes), *words])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"trl-qtarget plan: {said}")


# What FSDP wraps of a frozen model


@pytest.mark.parametrize(
    ("named", "wrapped"),
    [
        (None, None),
        (["Qwen3DecoderLayer"], ["Qwen3DecoderLayer"]),
        (["Qwen3MLP", "Qwen3Attention"], ["Qwen3MLP", "Qwen3Attention"]),  # a user's, finer than the model's own
        (["LlamaDecoderLayer"], None),  # of another family: the model's own
        (["LlamaDecoderLayer", "Embedding"], ["Embedding", "Qwen3DecoderLayer"]),
    ],
)
def test_a_frozen_model_is_wrapped_as_named_where_it_has_the_layers(monkeypatch, tiny_model, named, wrapped):
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=named, fsdp_version=2)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    seen = []

    def shard(accelerator, model):
        seen.append(accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap)
        return model

    monkeypatch.setattr(accelerate.utils, "fsdp2_prepare_model", shard)
    prepare_frozen(tiny_model(), accelerator)
    assert seen == [wrapped]
    assert accelerator.state.fsdp_plugin is plugin
    assert plugin.transformer_cls_names_to_wrap == named


@pytest.mark.slow
def test_a_measured_step_takes_what_was_predicted(tmp_path):
    """`python -m benchmarks.memory` for one setting; benchmarks/README.md has the others."""
    from benchmarks.memory import compare

    (row,) = compare(["target_sft"], tmp_path)
    assert abs(row["error_of_peak"]) < 0.15
