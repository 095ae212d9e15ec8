"""The seam: every name that no release of TRL, transformers or accelerate promises, and the error without it."""

import copy
import dataclasses
import inspect
import pkgutil
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from trl_qtarget import TargetSFTConfig, TargetSFTTrainer, compat
from trl_qtarget.compat import releases
from trl_qtarget.model.forward import install


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
            releases, "versions", lambda: {"trl": "1.16.0", "transformers": "5.0.0", "peft": "0.15.0", **versions}
        )
        compat.warn_if_outside.cache_clear()

    yield pretend
    compat.warn_if_outside.cache_clear()


# What is there


@pytest.mark.parametrize("name", compat.PARAMETERS)
def test_name(name):
    compat.find(name)


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


def test_the_fused_head_of_trl_is_known_by_name(tiny_model, tokenizer, rows, tmp_path):
    """A copy of a model that SFTTrainer has had would otherwise run the original's weights."""
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)
    model = tiny_model()
    SFTTrainer(model, args, train_dataset=Dataset.from_list(rows(4)), processing_class=tokenizer)
    assert "forward" in vars(model)
    assert compat.forward_of_instance(model) is None
    model.forward = lambda **inputs: None
    assert compat.forward_of_instance(model) is model.forward


def test_profiles_of_accelerate():
    assert {"zero2", "zero3", "fsdp2", "multi_gpu"} <= set(compat.accelerate_profiles())


# What is said once it is not


@pytest.fixture
def without(monkeypatch):
    """`without(name)` takes one private name away, and returns how a message spells it."""

    def remove(name):
        *path, last = name.replace(":", ".").split(".")
        owner = pkgutil.resolve_name(name.rpartition("." if "." in name.partition(":")[2] else ":")[0])
        if last in vars(owner) and inspect.ismodule(owner):
            monkeypatch.delattr(owner, last)
        else:  # of a class: an older definition would take its place
            monkeypatch.setattr(owner, last, lambda other: None)
        return re.escape(".".join([*path, last]))

    return remove


@pytest.mark.parametrize("name", compat.NAMES["a trainer"])
def test_a_name_that_is_gone_stops_a_trainer_from_being_made(make, without, name):
    with pytest.raises(ImportError, match=without(name)) as stop:
        make()
    assert compat.tested() in str(stop.value)


ENGINES = {
    "trl.models.utils:prepare_deepspeed": {"deepspeed_plugin": SimpleNamespace(zero_stage=3)},
    "trl.models.utils:prepare_fsdp": {"fsdp_plugin": SimpleNamespace(fsdp_version=1)},
    "accelerate.utils:fsdp2_prepare_model": {
        "fsdp_plugin": SimpleNamespace(fsdp_version=2, transformer_cls_names_to_wrap=None)
    },
}


def test_a_run_on_one_process_needs_no_name_of_another_engine(make, without):
    for name in ENGINES:
        without(name)
    make().train()


@pytest.mark.parametrize("name", ENGINES)
def test_a_name_of_an_engine_that_is_gone_stops_a_second_model_from_being_sharded(tiny_model, without, name):
    accelerator = SimpleNamespace(state=SimpleNamespace(**ENGINES[name]))
    with pytest.raises(ImportError, match=without(name)):
        compat.prepare_frozen(tiny_model(), accelerator)


@pytest.mark.parametrize("name", ["ds_id", "ds_shape", "ds_status"])
def test_an_attribute_that_zero3_no_longer_sets_is_named(name):
    sharded = SimpleNamespace(ds_id=0, ds_shape=(6, 2), ds_status=SimpleNamespace(name="NOT_AVAILABLE"), shape=(0,))
    assert compat.is_zero3_shard(sharded)
    assert compat.zero3_shape(sharded) == (6, 2)
    delattr(sharded, name)
    for read in (compat.is_zero3_shard, compat.zero3_shape):
        with pytest.raises(ImportError, match=rf"deepspeed .* has changed .*deepspeed\.zero\.Init\.{name}\."):
            read(sharded)


def test_a_gathered_parameter_is_no_shard():
    gathered = SimpleNamespace(ds_id=0, ds_shape=(6, 2), ds_status=SimpleNamespace(name="AVAILABLE"), shape=(6, 2))
    assert not compat.is_zero3_shard(gathered)


def test_a_trainer_without_signature_columns_is_named(make):
    trainer = make()
    del trainer._signature_columns
    with pytest.raises(ImportError, match=r"transformers\.Trainer\._signature_columns"):
        compat.keep_columns(trainer, ["trust"])


def test_a_parameter_that_has_moved_is_named(monkeypatch):
    import trl.models.utils

    monkeypatch.setattr(trl.models.utils, "prepare_fsdp", lambda accelerator, model: None)
    with pytest.raises(ImportError, match=r"trl.models.utils.prepare_fsdp\(model, accelerator, \.\.\.\)"):
        compat.check_names("a second model under FSDP1")


def test_a_module_that_is_gone_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.data_utils", None)
    with pytest.raises(ImportError, match=r"relies on: trl\.data_utils\.get_dataset_column_names"):
        compat.check_names()


def test_profiles_that_are_gone_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.accelerate_configs", None)
    with pytest.raises(ImportError, match=r"relies on: trl\.accelerate_configs"):
        compat.accelerate_profiles()


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
        {"transformers": "5.24.1"},
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
