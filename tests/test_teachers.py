"""Second models: adapters of the student's base, averages of the student, and what is told of them."""

import copy
import logging
import math
from types import SimpleNamespace

import compare
import pytest
import torch
from compare import logged
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trl_qtarget import TargetSFTConfig, TargetSFTTrainer, build
from trl_qtarget.compat import shards_weights
from trl_qtarget.loss.teacher import ProjectedLogits
from trl_qtarget.model.forward import install
from trl_qtarget.teachers.models import AdaptersOff, FrozenModel, OtherAdapter
from trl_qtarget.teachers.placement import OnHost, read_in_parts
from trl_qtarget.teachers.remembered import Average, Snapshot
from trl_qtarget.training.second_model import Choice, within_student


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}


@pytest.fixture
def train(student_dir, tokenizer, rows, tmp_path):
    """`train(loss=..., **options)` trains the saved tiny student for three steps, and returns the trainer."""

    def run(model=None, teacher=None, peft=None, go=True, **options):
        args = TargetSFTConfig(**{
            "output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
            "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "max_steps": 3,
            "learning_rate": 1e-2, "lr_scheduler_type": "constant", "per_device_train_batch_size": 4, **options,
        })  # fmt: skip
        kwargs = {} if teacher is None else {"teacher_model": teacher}
        trainer = TargetSFTTrainer(
            student_dir if model is None else model, args, train_dataset=Dataset.from_list(rows(16)),
            processing_class=tokenizer, peft_config=peft, **kwargs,
        )  # fmt: skip
        if go:
            trainer.train()
        return trainer

    return run


@pytest.fixture(scope="module")
def adapter_dir(student_dir, tokenizer, tmp_path_factory):
    """A folder with an adapter over the student's base, and the tokenizer."""
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(student_dir), LoraConfig(**LORA, init_lora_weights=False)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def same(a, b, rel=1e-4):
    a, b = (logged(x, "loss", "grad_norm") for x in (a, b))
    compare.same(a, b, rel, where="teachers/models.py, teachers/placement.py")


def equal_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))


# Adapters


@pytest.fixture
def merged(adapter_dir, student_dir):
    """The adapter's model, apart from everything."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student_dir), adapter_dir).merge_and_unload()


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "own head"])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:Model has `tie.*")
def test_an_adapter_of_the_same_base_needs_no_second_copy(train, adapter_dir, merged, options):
    lora = LoraConfig(**LORA, **options)
    inside = train(peft=lora, teacher_model_name_or_path=adapter_dir)
    assert isinstance(inside._teacher, OtherAdapter)
    same(inside, train(peft=lora, teacher=merged))
    assert inside.model.active_adapters == ["default"]
    assert list(inside.model.peft_config) == ["default"]
    trainable = {name for name, p in inside.model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".default" in name for name in trainable)


def test_the_borrowed_adapter_is_neither_trained_nor_saved(train, adapter_dir, tmp_path):
    trainer = train(peft=LoraConfig(**LORA), teacher_model_name_or_path=adapter_dir, go=False)
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if "qtarget_teacher" in n}
    assert before
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved/qtarget_teacher").exists()
    saved = load_file(tmp_path / "saved/adapter_model.safetensors")
    assert saved
    assert not [name for name in saved if "qtarget" in name]


def test_a_student_with_a_borrowed_adapter_resumes_bit_for_bit(train, adapter_dir, tmp_path):
    def run():
        return train(
            peft=LoraConfig(**LORA), teacher_model_name_or_path=adapter_dir, go=False, max_steps=4,
            save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "run"),
        )  # fmt: skip

    whole, resumed = run(), run()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert equal_weights(whole, resumed)


def test_an_adapter_teaches_a_fully_trained_student_over_a_base_of_its_own(train, adapter_dir, merged):
    apart = train(teacher_model_name_or_path=adapter_dir)
    assert isinstance(apart._teacher, FrozenModel)
    same(apart, train(teacher=merged))


def test_an_adapter_of_another_base_has_its_own(train, tiny_model, tokenizer, adapter_dir, tmp_path):
    tiny_model(seed=5).save_pretrained(tmp_path / "other")
    other = train(model=str(tmp_path / "other"), peft=LoraConfig(**LORA), teacher_model_name_or_path=adapter_dir)
    assert isinstance(other._teacher, FrozenModel)


def test_a_reference_is_the_base_and_not_the_adapter_beside_it(train, adapter_dir):
    assert isinstance(train(loss="asft", peft=LoraConfig(**LORA), go=False)._teacher, AdaptersOff)
    given = train(loss="asft", peft=LoraConfig(**LORA), teacher_model_name_or_path=adapter_dir, go=False)
    assert isinstance(given._teacher, OtherAdapter)


# Averages


def test_the_average_is_that_of_the_students_weights(train):
    """Beside an average kept by hand, from the weights that each update left."""
    decay, kept = 0.8, []
    trainer = train(teacher_ema_decay=decay, max_steps=4, go=False)
    own = trainer.training_step

    def step(model, *args, **kwargs):
        kept.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return own(model, *args, **kwargs)

    trainer.training_step = step
    trainer.train()
    for name, weight in trainer._teacher.weights.items():
        expected = kept[0][name]
        for after in kept[1:]:
            expected = decay * expected + (1 - decay) * after[name]
        compare.close(weight, expected, name, "Average in teachers/remembered.py", atol=1e-6, rtol=1e-5)
    assert trainer._teacher.taken_at == 3


@pytest.mark.parametrize("peft", [None, LoraConfig(**LORA)], ids=["full", "lora"])
def test_a_resumed_average_is_the_same_to_the_bit(train, tmp_path, peft):
    def run():
        return train(
            teacher_ema_decay=0.7, max_steps=5, go=False, peft=copy.deepcopy(peft), gradient_accumulation_steps=2,
            per_device_train_batch_size=2, save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "run"),
        )  # fmt: skip

    whole, resumed = run(), run()
    whole.train()
    assert (tmp_path / "run/checkpoint-2/qtarget_average.safetensors").is_file()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert equal_weights(whole, resumed)
    for name, weight in whole._teacher.weights.items():
        assert torch.equal(weight, resumed._teacher.weights[name])


@pytest.mark.parametrize("kind", [Snapshot, Average])
def test_an_earlier_student_is_read_with_its_own_head(tiny_model, kind):
    """The weights of now are back in the parameters when the loss uses what was read."""
    model, ids = tiny_model(seed=1), torch.tensor([[5, 6, 7, 8]])
    install(model)
    earlier, before = kind(model, 0.9 if kind is Average else 8), model(input_ids=ids).logits.detach()
    earlier.renew(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    read = earlier.read({"input_ids": ids})
    where = "read in teachers/models.py, active and renew in teachers/remembered.py"
    compare.close(read.hidden @ read.weight.T, before, "logits of the earlier student", where, rtol=1e-4, atol=1e-4)
    assert not read.weight.requires_grad


def test_only_what_is_trained_is_averaged_and_in_single_precision(train, tiny_model):
    trainer = train(peft=LoraConfig(**LORA), teacher_ema_decay=0.5)
    assert all("lora" in name for name in trainer._teacher.weights)
    model = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    average = Average(model, 0.999)
    average.renew(0)
    with torch.no_grad():
        model.weight.add_(1)
    average.renew(1)
    average.renew(1)
    kept = average.weights["weight"]
    assert kept.dtype == torch.float32
    torch.testing.assert_close(model.weight.float() - kept, torch.full((2, 2), 0.999), atol=1e-2, rtol=0)


def test_the_average_replaces_a_reference_and_starts_as_the_student(train):
    trainer = train(loss="sft_kl", teacher_ema_decay=0.5)
    assert isinstance(trainer._teacher, Average)
    first, second = logged(trainer, "loss", "nll")[:2]
    assert first[0] == pytest.approx(first[1], rel=1e-5)  # KL to itself is zero
    assert second[0] > second[1]


def test_checkpoints_without_an_average_are_noticed(train, tmp_path):
    folder = str(tmp_path / "run")
    train(loss="nll", max_steps=2, save_strategy="steps", save_steps=1, output_dir=folder)
    resumed = train(teacher_ema_decay=0.9, max_steps=2, output_dir=folder, go=False)
    with pytest.warns(UserWarning, match=r"has no qtarget_average\.safetensors"):
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-1")


def test_an_average_and_a_teacher_are_one_too_many(train, teacher_dir, tiny_model):
    for given in ({"teacher_model_name_or_path": teacher_dir}, {"teacher": tiny_model()}):
        with pytest.raises(ValueError, match="student its own teacher, and another teacher is given"):
            train(teacher_ema_decay=0.9, go=False, **given)
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        train(teacher_ema_decay=1.0, go=False)
    with pytest.warns(UserWarning, match="takes no teacher"):
        train(loss="dft", teacher_ema_decay=0.9, go=False)


@pytest.mark.parametrize(
    "state",
    [{"fsdp_plugin": object()}, {"deepspeed_plugin": SimpleNamespace(zero_stage=3)}],
    ids=["fsdp", "zero3"],
)
def test_copies_of_sharded_weights_are_refused(state):
    """Such a run cannot be made on this machine; what the check reads of the accelerator can."""
    accelerator = SimpleNamespace(state=SimpleNamespace(**state))
    for loss, decay in (("psft", None), ("target_sft", 0.9)):
        with pytest.raises(ValueError, match="shards them"):
            within_student(
                Choice([], needed=True),
                SimpleNamespace(
                    model=None,
                    target=build(loss),
                    args=SimpleNamespace(teacher_ema_decay=decay),
                    accelerator=accelerator,
                ),
            )
    assert not shards_weights(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=2))))


# Where a teacher's weights are, and how much it reads at once

TAUGHT = {
    "teacher": {"teacher_model_name_or_path": "teacher_dir"},
    "adapters off": {"loss": "iw_sft", "peft": LoraConfig(**LORA)},
    "snapshot": {"loss": "psft"},
}


@pytest.mark.parametrize("name", TAUGHT)
def test_a_teacher_that_reads_some_rows_at_a_time_says_the_same(train, teacher_dir, name):
    def run(**more):
        given = {key: teacher_dir if value == "teacher_dir" else value for key, value in TAUGHT[name].items()}
        return train(**copy.deepcopy(given), max_steps=2, **more)

    same(run(teacher_batch_size=3), run(), rel=1e-6)


@pytest.mark.parametrize("packing", [{}, {"packing": True, "packing_strategy": "wrapped", "max_length": 24}])
def test_rows_are_read_with_their_own_masks(train, teacher_dir, packing):
    trainer = train(teacher_model_name_or_path=teacher_dir, teacher_batch_size=3, go=False, **packing)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    inputs = {name: x for name, x in inputs.items() if name != "labels"} | {"use_cache": False}
    seen = []
    hook = trainer._teacher.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    parts, whole = (read_in_parts(trainer._teacher, inputs, size, trainer.accelerator).hidden for size in (3, None))
    hook.remove()
    assert seen == [3, 1, 4]
    learnt = inputs.get("attention_mask", torch.ones(4, whole.shape[1])).bool()
    torch.testing.assert_close(parts[learnt], whole[learnt], rtol=1e-6, atol=1e-6)


def test_ranks_that_share_weights_read_equally_often():
    """Two ranks with three rows and one: the gathering of weights needs both each time."""
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))

    def other_rank_has(parts):
        def gather(own):
            return torch.cat([own, torch.tensor([parts])])

        return SimpleNamespace(state=state, device=torch.device("cpu"), gather=gather)

    def read(*parts):
        calls.append([len(part["input_ids"]) for part in parts])
        return ProjectedLogits(torch.cat([part["input_ids"] for part in parts]), torch.zeros(5, 1))

    calls, ids = [], torch.arange(3)[:, None]
    teacher = SimpleNamespace(read=read)
    assert torch.equal(read_in_parts(teacher, {"input_ids": ids}, 2, other_rank_has(1)).hidden, ids)
    assert torch.equal(read_in_parts(teacher, {"input_ids": ids[:1]}, 2, other_rank_has(2)).hidden, ids[:1])
    assert calls == [[2, 1], [1, 1]]


def test_a_teacher_hands_over_hidden_states_and_never_logits(train, teacher_dir):
    trainer = train(teacher_model_name_or_path=teacher_dir, qtarget_self_check=False, go=False)
    seen = []
    backbone, head = trainer._teacher.model.model, trainer._teacher.model.lm_head
    head.register_forward_hook(lambda *_: pytest.fail("logits of the teacher were made"))
    backbone.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    trainer.train()
    assert seen == [False] * 3  # once a micro-batch
    said = trainer._teacher.read({"input_ids": torch.tensor([[5, 6, 7]])})
    assert said.hidden.shape == (1, 3, 48)
    assert not said.hidden.requires_grad


def test_weights_are_fetched_to_be_read_and_dropped_again(tiny_model):
    """No second device is here: copies stand for it."""
    model, moves = tiny_model(), []
    before = copy.deepcopy(model.state_dict())
    on_host = OnHost(model, torch.device("xpu"), lambda x, device: moves.append(device) or x.clone())
    home = [x.data_ptr() for x in (*model.parameters(), *model.buffers())]
    for turn in (1, 2):
        with on_host:
            there = [x.data_ptr() for x in (*model.parameters(), *model.buffers())]
            assert not set(there) & set(home)
            assert model.lm_head.weight is model.model.embed_tokens.weight  # moved once, and still tied
        assert [x.data_ptr() for x in (*model.parameters(), *model.buffers())] == home
        assert moves == [torch.device("xpu")] * len(home) * turn
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_what_an_offloaded_teacher_said_outlives_its_weights(train, teacher_dir):
    """A fetched copy stands for the device's; when it is dropped, NaN takes the place of all that nobody refers to."""
    trainer = train(teacher_model_name_or_path=teacher_dir, go=False)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    there = copy.deepcopy(trainer._teacher.read(inputs))
    moves = []

    def fetch(weight, device):
        moves.append(str(device))
        return weight.clone()

    frozen = FrozenModel(trainer._teacher.model, trainer.accelerator, offload=True)
    frozen.on_host = OnHost(frozen.model, torch.device("cpu"), fetch)
    weights = len(frozen.on_host.weights)
    offloaded = frozen.read(inputs)
    assert moves == ["cpu"] * weights
    for kept in frozen.on_host.kept:
        kept.fill_(math.nan)
    for name in ("hidden", "weight"):
        assert torch.equal(getattr(offloaded, name), getattr(there, name))
    assert frozen.model.lm_head.weight.isnan().all()  # the parameter itself is on the host again


def test_an_offloaded_teacher_trains_to_the_same_numbers(train, teacher_dir, monkeypatch):
    """No second device is here: past the refusal of that, copies are fetched, and dropped after each read."""
    whole = train(teacher_model_name_or_path=teacher_dir)
    monkeypatch.setattr("trl_qtarget.training.second_model.refuse_placement", lambda *_: None)
    monkeypatch.setattr(
        "trl_qtarget.teachers.models.OnHost", lambda model, device: OnHost(model, device, lambda x, _: x.clone())
    )
    same(train(teacher_model_name_or_path=teacher_dir, teacher_offload=True), whole, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"teacher_offload": True}, "this run is on the CPU"),
        ({"loss": "dft", "teacher_offload": True}, "loss 'dft' has none"),
        ({"loss": "dft", "teacher_batch_size": 2}, "loss 'dft' has none"),
        ({"teacher_cache": "somewhere", "teacher_batch_size": 2}, "teacher_cache stands for it"),
        ({"teacher_batch_size": 0}, "at least 1 row"),
        ({"teacher_batch_size": 2, "packing": True}, "joins the rows of a micro-batch into one"),
        ({"teacher_batch_size": 2, "padding_free": True}, "joins the rows of a micro-batch into one"),
    ],
)
def test_placements_that_cannot_be(train, teacher_dir, options, said):
    given = {} if {"teacher_cache", "loss"} & set(options) else {"teacher_model_name_or_path": teacher_dir}
    with pytest.raises(ValueError, match=said):
        train(**given, **options, go=False)


def test_weights_that_are_the_students_or_shared_out_are_not_offloaded(tiny_model):
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=object()))
    with pytest.raises(ValueError, match="shards the teacher"):
        FrozenModel(tiny_model(), accelerator, offload=True)
    whole = SimpleNamespace(state=SimpleNamespace())
    args = SimpleNamespace(teacher_ema_decay=0.9, teacher_offload=True)
    with pytest.raises(ValueError, match="this one has the student's"):
        within_student(
            Choice([], needed=True),
            SimpleNamespace(model=None, target=build("target_sft"), args=args, accelerator=whole),
        )


# What is told of a teacher


def test_the_teachers_own_nll_is_logged_once(train, teacher_dir, tokenizer, rows):
    trainer = train(teacher_model_name_or_path=teacher_dir, gradient_accumulation_steps=2)
    steps = [entry.get("qtarget/teacher_nll") for entry in trainer.state.log_history if "grad_norm" in entry]
    assert steps[0] > 0
    assert steps[1:] == [None, None]
    itself = train(loss="sft_kl")
    first = next(entry for entry in itself.state.log_history if "grad_norm" in entry)
    assert first["qtarget/teacher_nll"] == pytest.approx(first["nll"], rel=1e-5)


def test_a_teacher_worse_than_guessing_is_told(train, tiny_model, caplog):
    good, bad = tiny_model(seed=2), tiny_model(seed=2)
    with torch.no_grad():
        good.lm_head.weight.mul_(0)
        bad.lm_head.weight.mul_(10)
    with caplog.at_level(logging.WARNING, logger="trl_qtarget.training.checks"):
        trainer = train(teacher=bad, max_steps=1)
        assert "worse than an even guess among 100 tokens" in caplog.text
        caplog.clear()
        good.resize_token_embeddings(100)
        train(teacher=good, max_steps=1)
        assert not caplog.records
    assert logged(trainer, "qtarget/teacher_nll")[0][0] > math.log(100)
