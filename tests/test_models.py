"""Every family of models trains its loss: beside its own logits, beside TRL, and however a step is cut."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import conftest
import pytest
import torch
import zoo
from compare import Step, logged, same
from datasets import Dataset
from transformers import BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from trl_qtarget import TargetSFTConfig, TargetSFTTrainer, build, reference_loss


# PEFT says that merging such an adapter would change the head too; while it is trained, logits are the base head's
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:.*tie_word_embeddings")


@dataclass(frozen=True)
class Cell:
    """A student, its adapters, its data."""

    student: Callable[..., Any]
    peft: Any = None
    processor: Callable[[], Any] | None = None
    data: Callable[[], list[dict]] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def teacher(self) -> Any:
        return self.student(seed=2, wider=2)


def texts() -> list[dict]:
    """Rows whose very first token is learnt where virtual tokens stand before it."""
    return [{"text": row["prompt"] + row["completion"]} for row in conftest.make_rows(16)]


TIED, UNTIED = zoo.FAMILIES["Qwen3, tied"], zoo.FAMILIES["Qwen3, untied"]
CELLS = {name: Cell(make) for name, make in zoo.FAMILIES.items()}
CELLS |= {name: Cell(UNTIED, peft=config) for name, config in zoo.ADAPTERS.items()}
CELLS["LoRA, new tokens, tied"] = Cell(TIED, peft=zoo.ADAPTERS["LoRA, new tokens"])
CELLS["LoRA on tied embeddings"] = Cell(TIED, peft=zoo.lora(target_modules=["q_proj", "embed_tokens"]))
CELLS["prompt tuning, whole texts"] = Cell(UNTIED, peft=zoo.ADAPTERS["prompt tuning"], data=texts)
for name, (make, processor) in zoo.VISION.items():
    CELLS[f"{name}, images"] = Cell(make, processor=processor, data=zoo.picture_rows)
    CELLS[f"{name}, text"] = Cell(make, processor=processor, data=lambda: zoo.picture_rows(images=False))
    CELLS[f"{name}, images, LoRA"] = Cell(make, zoo.lora(), processor, zoo.picture_rows)


def cells(essential: tuple[str, ...], without: tuple[str, ...] = ()) -> list:
    """Names of cells; all but the essential ones are slow."""
    names = [name for name in CELLS if name not in without]
    return [name if name in essential else pytest.param(name, marks=pytest.mark.slow) for name in names]


QUIET = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True,
    "save_strategy": "no", "logging_steps": 1, "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4, "max_steps": 6,
}  # fmt: skip


@pytest.fixture
def make(tokenizer, rows, tmp_path):
    """`make(cell, loss=..., teacher=..., **options)`: its trainer. TRL's own where `loss` is None."""

    def run(cell, loss=None, teacher=None, student=None, **options):
        args = {**QUIET, "output_dir": str(tmp_path), **cell.options, **options}
        trainer, args = (SFTTrainer, SFTConfig(**args)) if loss is None else (
            TargetSFTTrainer, TargetSFTConfig(loss=loss, **args)
        )  # fmt: skip
        kwargs = {} if teacher is None else {"teacher_model": teacher}
        return trainer(
            student or cell.student(),
            args,
            train_dataset=Dataset.from_list(cell.data() if cell.data else rows(16)),
            processing_class=cell.processor() if cell.processor else tokenizer,
            peft_config=copy.deepcopy(cell.peft),
            **kwargs,
        )

    return run


def steps(trainer, *names) -> list[Step]:
    """What each step of its training logs."""
    trainer.train()
    return logged(trainer, *names)


# Beside the model's own logits


def doubled(model):
    """In double precision, where an error is one of the mathematics. Only one way of running experts knows it."""
    if hasattr(model, "set_experts_implementation"):  # transformers 5
        model.set_experts_implementation("eager")
    return model.double()


def own_loss(trainer, batch, loss, taught, tokens):
    """The loss from logits of the models' own forwards, and from the specification."""
    plain = {name: x for name, x in batch.items() if name != "labels"}
    if trainer.aux_loss_enabled:
        plain["output_router_logits"] = True
    labels = batch["labels"][:, 1:]
    learnt = labels != -100
    out = trainer.model(**plain)
    logits = out.logits[:, -batch["labels"].shape[1] :][:, :-1]  # without virtual tokens
    with torch.no_grad():
        taught = taught(**plain).logits[:, :-1]
    value = reference_loss(logits[learnt], labels[learnt], build(loss), taught[learnt]) / tokens
    return value + trainer.router_aux_loss_coef * out.aux_loss if trainer.aux_loss_enabled else value


def value_and_gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", ["target_sft", pytest.param("asft", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CELLS)
def test_it_is_the_loss_of_the_models_own_logits(make, name, loss):
    cell = CELLS[name]
    student, teacher = doubled(cell.student()), doubled(cell.teacher())
    taught = copy.deepcopy(teacher if loss == "target_sft" else student).eval()
    trainer = make(cell, loss, teacher if loss == "target_sft" else None, student)
    trainer.model.double().train()
    batch = next(iter(trainer.get_train_dataloader()))
    batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    tokens = torch.tensor(37)  # of a step of which this batch is a part
    trainer.current_gradient_accumulation_steps = 1
    ours, gradients = value_and_gradients(
        trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=tokens), trainer.model
    )
    own, expected = value_and_gradients(own_loss(trainer, batch, loss, taught, tokens), trainer.model)
    torch.testing.assert_close(ours, own, rtol=1e-6, atol=0)
    assert gradients.keys() == expected.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-6, atol=1e-9, msg=parameter)


# Beside TRL

BY_US_ALONE = ("LoRA, new tokens, tied",)  # TRL asks PEFT's wrapper of a tied head for a bias, which it has not


@pytest.mark.parametrize("name", cells(essential=("Gemma3, images", "DoRA"), without=BY_US_ALONE))
def test_nll_is_trls_step_for_step(make, name):
    names = ["loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"]
    same(steps(make(CELLS[name], "nll"), *names), steps(make(CELLS[name]), *names), 1e-4)


# However a step is cut

CUTS = ((4, 1), (2, 2), (1, 4))  # rows of a micro-batch, micro-batches


@pytest.fixture
def cut(make):
    """`cut(cell, loss, (rows, micro_batches), *names)`: what six steps of four rows log."""

    def run(cell, loss, how, *names, **options):
        taught = {"teacher": cell.teacher()} if loss == "target_sft" else {}
        rows, micro_batches = how
        options |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches}
        return steps(make(cell, loss, **taught, **options), *names)

    return run


@pytest.mark.parametrize("loss", ["target_sft", pytest.param("asft", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", cells(essential=("Qwen2.5-VL, images",)))
def test_a_step_is_a_step_however_it_is_cut(cut, name, loss):
    """Without the balancing loss of experts, which is a mean of each micro-batch by definition."""
    options = {"router_aux_loss_coef": 0.0} if name in zoo.MIXTURES else {}
    whole, *parts = (cut(CELLS[name], loss, how, "loss", "grad_norm", **options) for how in CUTS)
    for part in parts:
        same(part, whole, 1e-4)
    plain = cut(CELLS[name], "nll", CUTS[0], "loss", "grad_norm", **options)
    assert abs(whole[-1][0] - plain[-1][0]) > 0.01


@pytest.mark.parametrize("loss", ["target_sft", pytest.param("asft", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["Mixtral", *(pytest.param(n, marks=pytest.mark.slow) for n in zoo.MIXTURES[::2])])
def test_the_balancing_loss_is_added_once(cut, name, loss):
    without = cut(CELLS[name], loss, CUTS[0], "loss", router_aux_loss_coef=0.0, max_steps=1)
    for how in CUTS:
        ((total, aux),) = cut(CELLS[name], loss, how, "loss", "aux_loss", max_steps=1)
        assert total - 0.1 * aux == pytest.approx(without[0][0], rel=1e-4)


# In half precision


@pytest.mark.parametrize("name", ["Qwen3, tied", "Gemma2, a softcap", "Granite, logits divided", "LoRA"])
def test_mixed_precision_is_as_near_as_the_models_own(make, name):
    """At most twice the error of plain logits in bfloat16; the value, which may be right by chance, 1% more."""
    cell, loss, tokens = CELLS[name], "target_sft", torch.tensor(37)
    teacher = cell.teacher().eval()
    trainer = make(cell, loss, copy.deepcopy(teacher), bf16=True)
    model = trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    results = []
    with torch.autocast("cpu", torch.bfloat16):
        ours = trainer.compute_loss(model, dict(batch), num_items_in_batch=tokens)
        results.append(value_and_gradients(ours, model))
        results.append(value_and_gradients(own_loss(trainer, batch, loss, teacher, tokens), model))
    model.double(), teacher.double()
    true, exact = value_and_gradients(own_loss(trainer, batch, loss, teacher, tokens), model)
    (value, gradient), (own_value, own_gradient) = (
        (abs(value - true), sum((g[n].double() - x).square().sum() for n, x in exact.items()).sqrt())
        for value, g in results
    )
    assert value <= 2 * own_value + 1e-2 * abs(true)
    assert gradient <= 2 * own_gradient


# Quantized


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["target_sft", "asft"])
@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes", "ignore::FutureWarning:bitsandbytes")
def test_qlora_is_the_loss_of_the_models_own_logits(tmp_path, tokenizer, rows, loss):
    """A base in four bits, whose own forward with its adapters on, or off, is what is compared with."""
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}  # weights of whole blocks of 64
    conftest.save(zoo.FAMILIES["Qwen3, untied"](**wide), tokenizer, tmp_path / "student")
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    teacher = CELLS["Qwen3, untied"].teacher().eval()
    trainer = TargetSFTTrainer(
        str(tmp_path / "student"),
        TargetSFTConfig(loss=loss, output_dir=str(tmp_path), **QUIET, model_init_kwargs={"device_map": {"": "cpu"}}),
        train_dataset=Dataset.from_list(rows(16)),
        processing_class=tokenizer,
        peft_config=zoo.lora(),
        quantization_config=quantized,
        teacher_model=copy.deepcopy(teacher) if loss == "target_sft" else None,
    )
    model = trainer.model.train()
    quantized = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert quantized
    for module in quantized:  # some CPUs repack the weights in evaluation, for good, and cannot train afterwards
        module.support_avx512bf16_for_cpu = False

    def reference(**plain):
        with model.disable_adapter():
            return model(**plain)

    batch = next(iter(trainer.get_train_dataloader()))
    tokens = torch.tensor(37)
    ours, gradients = value_and_gradients(trainer.compute_loss(model, dict(batch), num_items_in_batch=tokens), model)
    taught = teacher if loss == "target_sft" else reference
    own, expected = value_and_gradients(own_loss(trainer, batch, loss, taught, tokens), model)
    torch.testing.assert_close(ours.double(), own.double(), rtol=1e-4, atol=0)
    assert gradients.keys() == expected.keys()
    for parameter, gradient in gradients.items():
        apart = (gradient.double() - expected[parameter].double()).norm() / expected[parameter].double().norm()
        assert apart < 0.01, parameter  # adapters are bfloat16
    assert all(abs(loss) < 1e3 for (loss,) in steps(trainer, "loss"))
