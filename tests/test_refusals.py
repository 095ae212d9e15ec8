"""What cannot be right is refused in one sentence, before any data is tokenized where it can be known by then."""

import inspect
from types import SimpleNamespace

import peft
import pytest
import zoo
from accelerate.parallelism_config import ParallelismConfig
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_qtarget import TargetSFTConfig, TargetSFTTrainer, build
from trl_qtarget.teachers.models import FrozenModel
from trl_qtarget.training.checks import refuse, refuse_model


PROMPT = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


class Untouched:
    def __iter__(self):
        raise AssertionError("the data was read")


@pytest.fixture
def make(tiny_model, tokenizer, tmp_path):
    """`make(loss=..., **options)`: a trainer, or what is raised instead; the data may not be read before."""

    def run(model=None, teacher=None, peft=None, data=None, processor=None, **options):
        given = {
            "output_dir": str(tmp_path), "loss": "dft", "use_cpu": True, "bf16": False, "report_to": "none",
            "save_strategy": "no", "gradient_checkpointing": False, "max_steps": 1, **options,
        }  # fmt: skip
        kwargs = {} if teacher is None else {"teacher_model": teacher}
        return TargetSFTTrainer(
            tiny_model(seed=1, tie=False) if model is None else model,
            TargetSFTConfig(**given),
            train_dataset=Untouched() if data is None else Dataset.from_list(data),
            processing_class=processor or tokenizer,
            peft_config=peft,
            **kwargs,
        )

    return run


def lacks(config, option):
    """The mark of a test that an older library skips, having no such option."""
    missing = option not in inspect.signature(config).parameters
    return pytest.mark.skipif(missing, reason=f"this {config.__module__.partition('.')[0]} has no {option}")


# Adapters on the head

ON_HEAD = {
    "list": {"target_modules": ["q_proj", "lm_head"]},
    "name": {"target_modules": "lm_head"},
    "regex": {"target_modules": r".*(q_proj|head)"},
    "parameter": pytest.param(
        {"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight"]},
        marks=lacks(LoraConfig, "target_parameters"),
    ),
}


@pytest.mark.parametrize("targets", ON_HEAD.values(), ids=ON_HEAD)
def test_an_adapter_on_the_head_is_refused(make, targets):
    with pytest.raises(ValueError, match="lm_head would never be trained"):
        make(peft=LoraConfig(**targets))


@pytest.mark.parametrize("targets", ["all-linear", r".*\.layers\..*_proj", ["q_proj"]], ids=str)
def test_adapters_elsewhere_are_not(make, rows, targets):
    trainer = make(peft=LoraConfig(target_modules=targets), data=rows(4))
    assert type(trainer.model.get_output_embeddings()).__name__ == "Linear"


def test_a_head_of_another_name_is_found(make):
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=640, **shape))
    name = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    with pytest.raises(ValueError, match="would never be trained"):
        make(model=model, peft=LoraConfig(target_modules=[name]))


@pytest.mark.parametrize("targets", ON_HEAD.values(), ids=ON_HEAD)
def test_a_ready_made_model_with_an_adapter_on_its_head_is_refused(make, tiny_model, targets):
    given = get_peft_model(tiny_model(tie=False), LoraConfig(**targets))
    with pytest.raises(ValueError, match="left out of its logits: train another"):
        make(model=given)
    with pytest.raises(ValueError, match=r"left out of its logits: pass teacher\.merge_and_unload"):
        make(teacher=given, loss="target_sft")


@lacks(LoraConfig, "ensure_weight_tying")
def test_adapters_tied_to_the_head_are_refused(make, tiny_model, rows):
    """Embeddings alone may be adapted: the head of a tied model is then the base's, in training as in generation."""
    tied = LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match="lm_head"):
        make(model=tiny_model(), peft=tied, data=rows(4))


def test_a_borrowed_adapter_with_part_of_the_head_is_merged(make, teacher_dir, tokenizer, rows, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(teacher_dir)
    on_head = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    get_peft_model(base, on_head).save_pretrained(tmp_path / "a", save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path / "a")
    own = LoraConfig(target_modules=["q_proj"])
    trainer = make(model=teacher_dir, peft=own, teacher=str(tmp_path / "a"), data=rows(4), loss="target_sft")
    assert isinstance(trainer._teacher, FrozenModel)
    assert not isinstance(trainer._teacher.model, PeftModel)


# Prompt learning


@pytest.mark.parametrize(
    "options", [{"padding_free": True, "max_length": None}, {"packing": True}], ids=["free", "bfd"]
)
def test_virtual_tokens_and_joined_rows_are_refused(make, options):
    with pytest.raises(ValueError, match="PEFT drops position_ids"):
        make(peft=PROMPT, **options)


def test_wrapped_packing_has_no_borders_to_lose(make, rows):
    make(peft=PROMPT, packing=True, packing_strategy="wrapped", max_length=32, data=rows(8), loss="nll").train()


@pytest.mark.skipif(peft.__version__.startswith("0.15."), reason="PEFT 0.15 puts no virtual tokens on this model")
def test_virtual_tokens_and_images_are_refused(make):
    with pytest.raises(ValueError, match="the ids by which images are placed"):
        make(model=zoo.gemma3(), processor=zoo.gemma3_processor(), peft=PROMPT, data=zoo.picture_rows(4))


# Images


def test_a_teacher_that_reads_no_images_is_refused(make, tiny_model):
    given = {"model": zoo.gemma3(), "processor": zoo.gemma3_processor(), "loss": "target_sft"}
    with pytest.raises(ValueError, match="Qwen3ForCausalLM reads none"):
        make(teacher=tiny_model(), data=zoo.picture_rows(4), **given)
    make(teacher=tiny_model(), data=zoo.picture_rows(4, images=False), **given)


# Engines


def config(**sizes):
    return SimpleNamespace(**{"sp_size": 1, "cp_size": 1, "tp_size": 1, **sizes})


@pytest.mark.parametrize("loss", ["nll", "target_sft"])
@pytest.mark.parametrize("name", ["cp_size", "tp_size"])
def test_parallelism_nobody_has_verified_is_refused(name, loss):
    args = SimpleNamespace(loss=loss, n_gpu=1, teacher_cache=None, parallelism_config=config(**{name: 2}))
    with pytest.raises(ValueError, match=rf"\({name}=2\) is not verified"):
        refuse(args, build(loss), "teacher", {}) if loss == "target_sft" else refuse(args, build(loss), None, {})


def test_ranks_with_parts_of_one_sequence_have_no_mean_of_their_own():
    args = SimpleNamespace(
        loss="nll", n_gpu=1, teacher_cache=None, parallelism_config=config(sp_size=2),
        average_tokens_across_devices=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="leave average_tokens_across_devices at true"):
        refuse(args, build("nll"), None, {})


@lacks(ParallelismConfig, "sp_size")
def test_parallelism_that_only_the_launcher_knows_of_is_refused(make, tiny_model, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    with pytest.raises(ValueError, match="cannot be trained with sequence parallelism"):
        make(teacher=tiny_model(), loss="target_sft")
    with pytest.raises(ValueError, match="virtual tokens of its own"):
        make(peft=PROMPT)


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_model_spread_over_devices_is_refused_in_a_distributed_run(whose, tiny_model):
    several = SimpleNamespace(
        distributed_state=SimpleNamespace(distributed_type="MULTI_GPU"), model_init_kwargs=None,
        teacher_model_init_kwargs=None,
    )  # fmt: skip
    name = "model_init_kwargs" if whose == "student" else "teacher_model_init_kwargs"
    setattr(several, name, {"device_map": "auto"})
    message = f"The {whose} has device_map='auto'"
    with pytest.raises(ValueError, match=message):
        refuse_model("s", "t", several, None)
    spread = tiny_model()
    spread.hf_device_map = {"model": 0, "lm_head": 1}
    setattr(several, name, None)
    with pytest.raises(ValueError, match="spreads it over the devices of one process"):
        refuse_model(*((spread, "t") if whose == "student" else ("s", spread)), several, None)


def test_activation_offloading_on_the_cpu_is_refused(make):
    with pytest.raises(ValueError, match="activation_offloading moves activations to the CPU"):
        make(activation_offloading=True)
