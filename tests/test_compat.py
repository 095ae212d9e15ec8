"""The seam: each thing that no release of TRL, transformers or accelerate promises, and what is said without it."""

import copy
import dataclasses
import importlib.resources
import inspect
import pkgutil
import subprocess
import sys
import warnings

import pytest
from datasets import Dataset

from trl_qtarget import TargetSFTConfig, TargetSFTTrainer, compat
from trl_qtarget.model.forward import install


NAMES = compat.NAMES | compat.NAMES_OF_EXPERTS | compat.NAMES_OF_COMMANDS


@pytest.fixture
def make(tiny_model, tokenizer, rows, tmp_path):
    """`make()` makes a trainer for one step."""

    def trainer():
        args = TargetSFTConfig(
            output_dir=str(tmp_path), loss="nll", use_cpu=True, bf16=False, report_to="none", max_steps=1,
            gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        data = Dataset.from_list(rows(4))
        return TargetSFTTrainer(tiny_model(), args, train_dataset=data, processing_class=tokenizer)

    return trainer


@pytest.fixture
def installed(monkeypatch):
    """`installed(trl="1.99")` makes it look so."""

    def pretend(**versions):
        monkeypatch.setattr(
            compat, "versions", lambda: {"trl": "1.16.0", "transformers": "5.0.0", "peft": "0.15.0", **versions}
        )
        compat.warn_if_outside.cache_clear()

    yield pretend
    compat.warn_if_outside.cache_clear()


# What is there


@pytest.mark.parametrize(("name", "parameters"), NAMES.items(), ids=NAMES)
def test_name(name, parameters):
    compat.find(name, parameters)


@pytest.mark.parametrize("name", compat.TRAINER_ATTRIBUTES)
def test_attribute_of_a_trainer(make, name):
    trainer = make()
    compat.check_trainer(trainer)
    setattr(trainer, name, None)
    with pytest.raises(ImportError, match=rf"trl \S+ has changed .*SFTTrainer\.{name}\. Tested with trl 1"):
        compat.check_trainer(trainer)


def test_metrics_make_their_own_lists(make):
    trainer = make()
    trainer._metrics = {"train": {}, "eval": {}}
    with pytest.raises(ImportError, match="_metrics"):
        compat.check_trainer(trainer)


def test_a_trainer_of_experts_has_their_coefficient(make):
    trainer = copy.copy(make())
    trainer.aux_loss_enabled = True
    if not hasattr(trainer, "router_aux_loss_coef"):
        with pytest.raises(ImportError, match="router_aux_loss_coef"):
            compat.check_trainer(trainer)
    trainer.router_aux_loss_coef = 0.1
    compat.check_trainer(trainer)


def test_attributes_of_a_trainer_that_has_trained(make):
    trainer = make()
    trainer.train()
    assert {"input_ids", "labels"} <= set(trainer._signature_columns)
    assert trainer.current_gradient_accumulation_steps == 1
    assert compat.tensor_parallel_size(trainer) == 1
    assert compat.sequence_parallel_size(trainer.accelerator.parallelism_config) == 1


def test_profiles_of_accelerate():
    files = [file.name for file in importlib.resources.files("trl.accelerate_configs").iterdir()]
    assert {"zero2.yaml", "zero3.yaml", "fsdp2.yaml", "multi_gpu.yaml"} <= set(files)


# What is said once it is not


@pytest.mark.parametrize("name", compat.NAMES)
def test_a_name_that_is_gone_stops_a_trainer_from_being_made(make, monkeypatch, name):
    *path, last = name.replace(":", ".").split(".")
    owner = pkgutil.resolve_name(name.rpartition("." if "." in name.partition(":")[2] else ":")[0])
    if last in vars(owner) and inspect.ismodule(owner):
        monkeypatch.delattr(owner, last)
    else:  # of a class: an older definition would take its place
        monkeypatch.setattr(owner, last, lambda other: None)
    with pytest.raises(ImportError, match=".".join([*path, last])) as stop:
        make()
    assert compat.tested() in str(stop.value)


def test_a_parameter_that_has_moved_is_named(monkeypatch):
    import trl.models.utils

    monkeypatch.setattr(trl.models.utils, "prepare_fsdp", lambda accelerator, model: None)
    with pytest.raises(ImportError, match=r"trl.models.utils.prepare_fsdp\(model, accelerator, \.\.\.\)"):
        compat.check_names()


def test_a_module_that_is_gone_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.models.utils", None)
    with pytest.raises(ImportError, match=r"relies on: trl\.models\.utils\.prepare_"):
        compat.check_names()


@pytest.mark.parametrize("prefix", ["model", "", "language_model"])
def test_a_backbone_is_found_where_its_class_misnames_it(tiny_model, monkeypatch, prefix):
    model = tiny_model()
    monkeypatch.setattr(type(model), "base_model_prefix", prefix)
    assert compat.backbone(model) is model.model


def test_a_model_whose_backbone_is_elsewhere_is_refused(tiny_model):
    model = tiny_model().model  # a backbone has none below it
    with pytest.raises(ValueError, match=r"Qwen3Model of transformers \S+ keeps its backbone where"):
        install(model)


@pytest.mark.parametrize(("given", "updates"), [(0, 0), (0.1, 5), (0.25, 13), (1, 1), (7.0, 7)])
def test_a_fraction_of_warmup_is_one_in_every_transformers(tmp_path, given, updates):
    args = TargetSFTConfig(str(tmp_path), loss="nll", use_cpu=True, bf16=False, warmup_steps=given)
    assert args.get_warmup_steps(50) == updates
    assert dataclasses.replace(args).get_warmup_steps(50) == updates


# The tested range


@pytest.mark.parametrize(
    "versions",
    [
        {},
        {"trl": "1.15.0"},
        {"trl": "1.16.9"},
        {"transformers": "4.56.2"},
        {"transformers": "5.23.1"},
        {"peft": "not installed"},
    ],
)
def test_nothing_is_said_inside_the_range(installed, versions):
    installed(**versions)
    assert compat.outside() == []
    compat.warn_if_outside()


@pytest.mark.parametrize(
    "versions",
    [{"trl": "1.17.0"}, {"trl": "1.14.2"}, {"trl": "2.0.0.dev0"}, {"transformers": "4.55.4"}, {"peft": "0.14.0"}],
)
def test_outside_of_it_one_warning_names_the_range(installed, versions, make):
    installed(**versions)
    ((package, version),) = versions.items()
    message = rf"tested with trl 1\.15 to 1\.16, .* installed is {package} {version}"
    with pytest.warns(UserWarning, match=message) as said:
        make(), make()
    assert sum("trl_qtarget is tested" in str(warning.message) for warning in said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.warn_if_outside()  # once a process


def test_this_environment_is_inside_the_range():
    """Else the tests above say nothing of it: raise TESTED when `make test-versions` has run with the new release."""
    assert compat.outside() == []


# What an issue needs


def test_report():
    """In a process of its own: what has been imported here must not matter."""
    run = subprocess.run([sys.executable, "-m", "trl_qtarget.compat"], capture_output=True, text=True, check=True)
    lines = dict(line.split(" ", 1) for line in run.stdout.splitlines())
    assert {"trl-qtarget", "python", "platform", "device", "CUDA", *compat.PACKAGES} <= set(lines)
    assert lines["trl"] == compat.versions()["trl"]
    assert lines["tested"] == f"with {compat.tested()}; outside of that: nothing"
    assert "qtarget_backend=auto is t" in lines["device"]
