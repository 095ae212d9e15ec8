"""The trainer beside TRL's own, step for step, and each way of feeding it."""

import copy
import math
import warnings
from types import SimpleNamespace

import compare
import pytest
import torch
from compare import logged, same
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from trl_qtarget import ProjectedLogits, TargetSFTConfig, TargetSFTTrainer, build, qtarget_loss
from trl_qtarget.data.collators import trajectories
from trl_qtarget.loss.per_token import PerToken
from trl_qtarget.loss.products import Head
from trl_qtarget.training.checks import refuse
from trl_qtarget.training.config import TargetSFTConfig as Config
from trl_qtarget.training.kernels import Kernels
from trl_qtarget.training.scorer import SUMS, Scorer


QUIET = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4,
    "max_steps": 3,
}


@pytest.fixture
def train(tiny_model, tokenizer, rows, tmp_path):
    """`train(loss=..., **options)` trains a fresh tiny student and returns the trainer."""

    def run(cls=TargetSFTTrainer, model=None, data=None, teacher=None, peft=None, go=True, eval_data=None, **options):
        args = {**QUIET, "output_dir": str(tmp_path / "out"), **options}
        args = TargetSFTConfig(**args) if cls is TargetSFTTrainer else SFTConfig(**args)
        kwargs = {} if teacher is None else {"teacher_model": teacher}
        trainer = cls(
            tiny_model(seed=1) if model is None else model,
            args,
            train_dataset=Dataset.from_list(rows(16)) if data is None else data,
            eval_dataset=eval_data,
            processing_class=tokenizer,
            peft_config=peft,
            **kwargs,
        )
        if go:
            trainer.train()
        return trainer

    return run


def teacher(tiny_model, **kwargs):
    return tiny_model(**{"hidden": 48, "tie": False, "seed": 2, **kwargs})


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_equals_trl_step_for_step(train, loss):
    names = ["loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"]
    where = "shifted_labels in loss/per_token.py, install in model/forward.py, _reduced in training/trainer.py"
    same(logged(train(loss=loss), *names), logged(train(SFTTrainer, loss_type=loss), *names), where=where)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
        {"padding_free": True, "max_length": None},
        {"gradient_checkpointing": True},
        {"qtarget_chunk_size": 1},
    ],
    ids=lambda o: ",".join(o),
)
@pytest.mark.parametrize("loss", ["target_sft", "asft"])
def test_one_step_is_one_step_however_it_is_cut(train, tiny_model, loss, options):
    taught = {"teacher": teacher(tiny_model)} if loss == "target_sft" else {}
    whole = train(loss=loss, **copy.deepcopy(taught))
    same(logged(train(loss=loss, **taught, **options), "loss", "grad_norm"), logged(whole, "loss", "grad_norm"), 1e-4)


def test_packed_equals_padded(train, tiny_model, tokenizer, rows):
    """Four rows in one packed row, or in four padded ones: the same tokens, positions and neighbours."""
    data = Dataset.from_list(rows(4))
    step = {"data": data, "max_steps": 1, "loss": "target_sft"}
    padded = train(teacher=teacher(tiny_model), **step)
    packed = train(teacher=teacher(tiny_model), packing=True, max_length=256, **step)
    same(logged(packed, "loss", "grad_norm"), logged(padded, "loss", "grad_norm"), 1e-4)


@pytest.mark.parametrize("loss", ["iw_sft", "talr"])
def test_trajectories_are_found_in_packed_rows(train, rows, loss):
    step = {"data": Dataset.from_list(rows(4)), "max_steps": 1, "loss": loss, "num_train_epochs": 1}
    packed = train(packing=True, max_length=256, **step)
    same(logged(packed, "loss", "grad_norm"), logged(train(**step), "loss", "grad_norm"), 1e-4)


def test_a_teacher_that_is_the_student_makes_target_sft_dft(train, tiny_model):
    dft = train(loss="dft", max_steps=1)
    taught = train(loss="target_sft", max_steps=1, teacher=tiny_model(seed=1))
    same(logged(taught, "grad_norm"), logged(dft, "grad_norm"), 1e-4)
    off = train(loss="target_sft", loss_kwargs={"eta": 0.0}, teacher=teacher(tiny_model))
    same(logged(off, "loss", "grad_norm"), logged(train(loss="dft"), "loss", "grad_norm"))


def test_the_sums_of_a_batch_are_those_of_its_tokens():
    torch.manual_seed(0)
    hidden, weight, other = torch.randn(2, 5, 4), torch.randn(9, 4), torch.randn(9, 4)
    labels = torch.randint(9, (2, 5))
    labels[0, 3:] = -100
    teacher, target = ProjectedLogits(hidden, other), build("asft")
    scored = Scorer(target, PerToken(labels), Kernels(), teacher)(hidden, labels, Head(weight), None)
    told = qtarget_loss(hidden, weight, labels, target, teacher=teacher)
    expected = {"tokens": torch.tensor(8), "nll": -told.log_p_y.sum(), "top1": told.is_top1.sum()}
    for name, total in zip(SUMS, scored.sums, strict=True):
        wanted = expected[name] if name in expected else getattr(told, name).sum()
        compare.close(total, wanted.float(), f"sum of {name}", "Scorer in training/scorer.py")


def test_metrics_are_means_over_tokens(train, tiny_model):
    """Two micro-batches of different lengths: a mean of means would differ from the mean over tokens."""
    names = ["nll", "qtarget/trust", "qtarget/moved", "qtarget/target_p_y", "qtarget/grad_mass"]
    one = train(loss="target_sft", teacher=teacher(tiny_model), max_steps=1)
    two = train(
        loss="target_sft", teacher=teacher(tiny_model), max_steps=1,
        per_device_train_batch_size=1, gradient_accumulation_steps=4,
    )  # fmt: skip
    same(logged(two, *names), logged(one, *names), 1e-4)


def test_evaluation_reports_the_loss_its_nll_and_the_target(train, tiny_model, rows):
    trainer = train(loss="target_sft", teacher=teacher(tiny_model), eval_data=Dataset.from_list(rows(8, seed=3)))
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_nll", "eval_entropy", "eval_qtarget/moved"} <= set(metrics)
    plain = train(loss="nll", go=False, model=trainer.model, eval_data=Dataset.from_list(rows(8, seed=3))).evaluate()
    assert metrics["eval_nll"] == pytest.approx(plain["eval_nll"], rel=1e-5)


def test_compute_metrics_gets_logits(train, tokenizer, tiny_model, rows, tmp_path):
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer = TargetSFTTrainer(
            tiny_model(seed=1),
            TargetSFTConfig(**QUIET, output_dir=str(tmp_path), loss="dft"),
            train_dataset=Dataset.from_list(rows(8)),
            eval_dataset=Dataset.from_list(rows(8)),
            processing_class=tokenizer,
            compute_metrics=lambda p: {"rows": len(seen) or seen.append(p.predictions.shape) or 1},
        )
        trainer.evaluate()
    assert seen[0][-1] == 640


def messages(rows):
    return Dataset.from_list([{"messages": r["prompt"] + r["completion"]} for r in rows])


@pytest.mark.parametrize("kind", ["conversational", "assistant_only", "text", "streaming", "wrapped"])
def test_every_kind_of_data(train, rows, kind):
    chat = rows(8, conversational=True)
    options = {"loss": "dft", "max_steps": 2}
    if kind == "conversational":
        options["data"] = Dataset.from_list(chat)
    elif kind == "assistant_only":
        options |= {"data": messages(chat), "assistant_only_loss": True}
    elif kind == "text":
        options["data"] = Dataset.from_list([{"text": r["prompt"] + r["completion"]} for r in rows(8)])
    elif kind == "streaming":
        options["data"] = IterableDataset.from_generator(lambda: iter(rows(8)))
    else:
        options |= {"packing": True, "packing_strategy": "wrapped", "max_length": 32}
    ours = train(**options)
    options.pop("loss")
    same(logged(ours, "loss", "grad_norm"), logged(train(SFTTrainer, loss_type="dft", **options), "loss", "grad_norm"))


def test_plain_config_and_paths(student_dir, teacher_dir, rows, tmp_path):
    args = SFTConfig(**QUIET, output_dir=str(tmp_path), loss_type="dft")
    trainer = TargetSFTTrainer(student_dir, args, train_dataset=Dataset.from_list(rows(8)))
    assert trainer.args.loss == "dft"
    args = TargetSFTConfig(**QUIET, output_dir=str(tmp_path), teacher_model_name_or_path=teacher_dir)
    trainer = TargetSFTTrainer(student_dir, args, train_dataset=Dataset.from_list(rows(8)))
    trainer.train()
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, "init_lora_weights": False}


def test_lora_reads_its_reference_from_the_base_weights(train, tiny_model):
    """No second model, and the same loss as with a frozen copy of the base as reference."""
    off = train(loss="asft", peft=LoraConfig(**LORA))
    assert type(off._teacher).__name__ == "AdaptersOff"
    apart = train(loss="asft", peft=LoraConfig(**LORA), teacher=tiny_model(seed=1))
    same(logged(off, "loss", "grad_norm"), logged(apart, "loss", "grad_norm"), 1e-4)
    assert off.model.active_adapters == ["default"]
    assert off.model.training


def test_lora_with_a_head_of_its_own_keeps_the_base_head_for_its_reference(train, tiny_model):
    config = {**LORA, "modules_to_save": ["lm_head"]}
    base = tiny_model(seed=1, tie=False)
    off = train(loss="sft_kl", model=copy.deepcopy(base), peft=LoraConfig(**config))
    apart = train(loss="sft_kl", model=copy.deepcopy(base), peft=LoraConfig(**config), teacher=base)
    same(logged(off, "loss", "grad_norm"), logged(apart, "loss", "grad_norm"), 1e-4)


def test_a_reference_is_the_student_before_training(train):
    trainer = train(loss="sft_kl")
    first, last = (logged(trainer, "loss", "nll")[i] for i in (0, -1))
    assert first[0] == pytest.approx(first[1], rel=1e-5)  # KL to itself is zero
    assert last[0] > last[1]


def test_psft_remembers_the_model_of_the_last_refresh(train):
    steps = logged(train(loss="psft", loss_kwargs={"refresh": 2}, max_steps=4), "loss")
    assert steps[0] == pytest.approx([-1], rel=1e-5)  # the ratio is one at each refresh
    assert steps[2] == pytest.approx([-1], rel=1e-5)
    assert abs(steps[1][0] + 1) > 1e-3, "the snapshot moves with the student: see Snapshot in teachers/remembered.py"


def test_iw_sft_starts_as_sft(train):
    same(logged(train(loss="iw_sft", max_steps=1), "loss"), logged(train(loss="nll", max_steps=1), "loss"))


def test_a_teacher_padded_to_another_size_is_compared_over_the_real_ids(train, tiny_model, tokenizer):
    """Rows that no tokenizer knows change nothing, on either side, and what they hold does not matter."""
    tokens = len(tokenizer)
    wide = teacher(tiny_model, vocab_size=704)
    narrow = copy.deepcopy(wide)
    narrow.resize_token_embeddings(tokens)
    with torch.no_grad():
        wide.lm_head.weight[tokens:] = 50.0
    student = tiny_model(seed=1)
    trainers = [
        train(loss="target_sft", model=copy.deepcopy(student), teacher=t.eval(), max_steps=2) for t in (wide, narrow)
    ]
    assert [t._columns for t in trainers] == [tokens, tokens]
    same(*(logged(t, "loss", "grad_norm") for t in trainers))


def test_trust_floor_and_trusted_tokens(train, tokenizer):
    assert logged(train(loss="dft", trust_floor=1.0), "grad_norm") == logged(train(loss="nll"), "grad_norm")
    plain, trusting = (
        logged(train(loss="dft", max_steps=1, **o), "qtarget/trust")[0][0]
        for o in ({}, {"trust_token_ids": ["special"]})
    )
    assert trusting > plain + 0.1
    with pytest.raises(ValueError, match="'<nope>' is no token"):
        train(loss="dft", trust_token_ids=["<nope>"], go=False)


def test_token_weights_scale_the_loss(train, tokenizer, rows):
    double, plain = (
        train(loss="nll", data=weighted(tokenizer, rows(8), lambda i, w=w: w), max_steps=1) for w in (2.0, 1.0)
    )
    assert logged(double, "grad_norm")[0][0] == pytest.approx(2 * logged(plain, "grad_norm")[0][0])
    double, plain = (trainer.state.log_history[-1]["train_loss"] for trainer in (double, plain))
    assert double == pytest.approx(2 * plain)  # transformers 4 rounds what it logs step by step
    with pytest.raises(ValueError, match="reads a token_weight column"):
        train(loss="critical_token")


def test_a_mixture_of_experts_keeps_its_balancing_loss(train):
    from transformers import MixtralConfig, MixtralForCausalLM

    def moe():
        torch.manual_seed(0)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=640, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.3,
                max_position_embeddings=512, pad_token_id=0, eos_token_id=3, router_aux_loss_coef=0.1,
            )
        )  # fmt: skip

    names = ["loss", "grad_norm", "aux_loss"]
    # Adam would magnify rounding, which transformers 4 orders differently
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "optim": "sgd"}
    same(
        logged(train(loss="nll", model=moe(), **options), *names),
        logged(train(SFTTrainer, model=moe(), **options), *names),
    )


def test_softcap_and_logit_scale_are_read_from_the_configuration(train):
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    shape = {
        "vocab_size": 640, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "initializer_range": 0.3,
        "pad_token_id": 0, "eos_token_id": 3, "bos_token_id": None,
    }  # fmt: skip
    gemma = Gemma2ForCausalLM(Gemma2Config(**shape, head_dim=16, final_logit_softcapping=2.0))
    cohere = CohereForCausalLM(CohereConfig(**shape, logit_scale=0.2))
    for model in (gemma, cohere):
        ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
        same(
            logged(train(loss="nll", model=ours), "loss", "grad_norm"),
            logged(train(SFTTrainer, model=theirs), "loss", "grad_norm"),
        )


@pytest.mark.parametrize("loss", ["target_sft", "asft"])
def test_a_resumed_run_is_the_uninterrupted_one(train, tiny_model, loss, tmp_path):
    def run(**options):
        taught = {"teacher": teacher(tiny_model)} if loss == "target_sft" else {}
        return train(loss=loss, max_steps=4, go=False, save_strategy="steps", save_steps=2, **taught, **options)

    whole = run(output_dir=str(tmp_path / "run"))
    whole.train()
    resumed = run(output_dir=str(tmp_path / "run"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_saved_models_load_without_the_package(train, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = train(loss="target_sft", teacher=teacher(tiny_model), max_steps=1)
    trainer.save_model(str(tmp_path / "m"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(again.lm_head.weight, trainer.model.lm_head.weight)
    card = tmp_path / "m/README.md"
    trainer.create_model_card()
    assert "2606.11189" in (tmp_path / "out/README.md").read_text() or card.exists()


def weighted(tokenizer, rows, weights):
    """Tokenized rows whose n-th token has the n-th weight."""
    out = []
    for row in rows:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        out.append({"input_ids": ids, "labels": ids, "token_weight": [weights(i) for i in range(len(ids))]})
    return Dataset.from_list(out)


def test_a_weight_is_that_of_the_token_that_is_predicted(train, tokenizer):
    data = Dataset.from_list(
        [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9], "token_weight": [0, 0, 1, 0, 1]}] * 4
    )
    trust = logged(train(loss="critical_token", data=data, max_steps=1), "qtarget/trust")
    assert trust[0][0] == pytest.approx(2 / 3)
    cut = train(loss="critical_token", data=data, max_steps=1, max_length=4)  # the last token goes, and its weight
    assert logged(cut, "qtarget/trust")[0][0] == pytest.approx(1 / 2)


def test_documents_of_different_rows_are_different_trajectories():
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    found = trajectories({"labels": torch.zeros(2, 4), "position_ids": positions})
    assert torch.equal(found.unique(return_inverse=True)[1], torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2]]))


def test_a_reference_knows_no_dropout(train, tiny_model):
    config = {**LORA, "lora_dropout": 0.0}
    torch.manual_seed(0)
    noisy = tiny_model(seed=1, attention_dropout=0.5)
    off = train(loss="sft_kl", model=noisy, peft=LoraConfig(**config), max_steps=1)
    twice = [off._teacher.read({"input_ids": torch.tensor([[5, 6, 7, 8]])}).hidden for _ in range(2)]
    assert torch.equal(*twice)
    assert off.model.training


def test_the_student_itself_may_be_given_as_its_teacher(train, tiny_model):
    model = tiny_model(seed=1)
    trainer = train(loss="target_sft", model=model, teacher=model, max_steps=1)
    same(logged(trainer, "grad_norm"), logged(train(loss="dft", max_steps=1), "grad_norm"), 1e-4)


def test_a_resumed_psft_remembers_the_same_model(train, tmp_path):
    def run():
        return train(
            loss="psft", loss_kwargs={"refresh": 3}, max_steps=5, go=False,
            save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "run"),
        )  # fmt: skip

    whole, resumed = run(), run()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_head_that_does_more_than_its_configuration_says_is_noticed(train, tiny_model):
    model = tiny_model(seed=1)
    model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(RuntimeError, match="does something to its logits"):
        train(loss="nll", model=model)


def test_a_teacher_that_lacks_tokens_is_refused(train, tiny_model, tokenizer):
    with pytest.raises(ValueError, match="must know every token of the student"):
        train(loss="target_sft", teacher=teacher(tiny_model, vocab_size=50), go=False)


# Refusals


def test_a_forward_replaced_behind_our_back_is_noticed(train):
    trainer = train(loss="dft", go=False)
    own = type(trainer.model).forward
    trainer.model.forward = lambda *a, qtarget=None, **k: own(trainer.model, *a, **k)
    with pytest.raises(RuntimeError, match="was not used"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "dtf"}, "Did you mean 'dft'"),
        ({"loss": "dft", "loss_type": "dft"}, "pass --loss dft"),
        ({"label_smoothing_factor": 0.1}, "--loss label_smoothing"),
        ({"use_liger_kernel": True}, "leave it unset"),
        ({"loss_kwargs": "{eta"}, "must be JSON"),
        ({"loss_kwargs": {"beta": 1}}, "takes eta, not beta"),
        ({"trust_floor": 2.0}, "between 0 and 1"),
        ({"qtarget_backend": "cuda"}, "must be one of"),
        ({"qtarget_chunk_size": 0}, "at least 1"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be_meant(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Config(**QUIET, output_dir=str(tmp_path), **options)


def test_refusals_come_before_the_data(tiny_model, tokenizer, tmp_path):
    class Untouched:
        def __iter__(self):
            raise AssertionError("the data was read")

    def make(loss, **kwargs):
        args = TargetSFTConfig(**QUIET, output_dir=str(tmp_path), loss=loss)
        return TargetSFTTrainer(tiny_model(), args, train_dataset=Untouched(), processing_class=tokenizer, **kwargs)

    with pytest.raises(ValueError, match="needs a teacher"):
        make("target_sft")
    with pytest.raises(ValueError, match="compute_loss_func would replace"):
        make("dft", compute_loss_func=lambda *a, **k: 0)
    args = TargetSFTConfig(**QUIET, output_dir=str(tmp_path), loss="dft")
    with pytest.raises(ValueError, match="compute_loss_func would replace"):  # by position, as TRL allows
        TargetSFTTrainer(tiny_model(), args, None, Untouched(), None, tokenizer, lambda *a, **k: 0)
    with pytest.raises(ValueError, match="lm_head would never be trained"):
        make("dft", peft_config=LoraConfig(target_modules=["lm_head"]))


@pytest.mark.parametrize("loss", ["target_sft", "asft", "psft", "iw_sft"])
def test_several_models_and_a_split_sequence_are_refused(loss):
    """Neither can be made on this machine; what the check reads of the arguments can."""
    split = SimpleNamespace(loss=loss, n_gpu=1, teacher_cache=None, parallelism_config=SimpleNamespace(sp_size=2))
    with pytest.raises(ValueError, match="sequence parallelism"):
        refuse(split, build(loss), "teacher" if loss == "target_sft" else None, {})
    with pytest.raises(ValueError, match=r"nn\.DataParallel"):
        refuse(SimpleNamespace(loss="nll", n_gpu=2, teacher_cache=None), build("nll"), None, {})


def test_a_teacher_nobody_asked_for_is_a_warning(train, tiny_model):
    with pytest.warns(UserWarning, match="takes no teacher"):
        train(loss="dft", teacher=teacher(tiny_model), go=False)


def test_the_fields_we_add_are_these_and_no_others():
    added = set(Config.__dataclass_fields__) - set(SFTConfig.__dataclass_fields__)
    assert added == {
        "loss", "loss_kwargs", "teacher_model_name_or_path", "teacher_model_revision", "teacher_model_init_kwargs",
        "teacher_cache", "teacher_ema_decay", "teacher_offload", "teacher_batch_size",
        "trust_floor", "trust_token_ids",
        "qtarget_backend", "qtarget_chunk_size", "qtarget_self_check",
    }  # fmt: skip


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_mixed_precision_equals_trls_up_to_rounding(train, loss):
    """Our logits come from one bfloat16 product, TRL's from float32 ones of the same bfloat16 inputs."""
    ours, theirs = train(loss=loss, bf16=True), train(SFTTrainer, loss_type=loss, bf16=True)
    same(logged(ours, "loss", "grad_norm"), logged(theirs, "loss", "grad_norm"), 2e-2)
