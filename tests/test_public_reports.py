"""Numbers that public bug reports of other trainers were about: each beside a value from an independent computation.

The comment above a group names the report that its inputs were made from.
"""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, TrainableTokensConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_qtarget import (
    PRESETS,
    ProjectedLogits,
    Target,
    TargetSFTConfig,
    TargetSFTTrainer,
    TopKLogits,
    build,
    qtarget_loss,
)
from trl_qtarget.cli import main
from trl_qtarget.training.metrics import without_repeats
from trl_qtarget.training.second_model import AdaptersOff, Initial


# PEFT warns of what these tests are about
pytestmark = pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning")


@pytest.fixture
def train(tiny_model, tokenizer, rows, tmp_path):
    """`train(loss=..., **options)` makes a trainer of a tiny student, and trains it for one step."""

    def run(model=None, teacher=None, peft=None, data=None, eval_data=None, go=True, processor=None, **options):
        args = TargetSFTConfig(**{
            "output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
            "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "max_steps": 1,
            "learning_rate": 1e-2, "shuffle_dataset": False, **options,
        })  # fmt: skip
        trainer = TargetSFTTrainer(
            tiny_model(seed=1) if model is None else model, args,
            train_dataset=Dataset.from_list(rows(4) if data is None else data), eval_dataset=eval_data,
            processing_class=processor or tokenizer, peft_config=peft, teacher_model=teacher,
        )  # fmt: skip
        if go:
            trainer.train()
        return trainer

    return run


def logged(trainer, name):
    return next(entry[name] for entry in trainer.state.log_history if name in entry)


def nll(model, rows):
    """Mean negative log-likelihood of the labels of prepared rows, row by row, by the model's own forward."""
    model.eval()
    found = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits.double()[0, -len(labels) : -1].log_softmax(-1)
        at = labels[1:] != -100
        found.append(log_p[at].gather(-1, labels[1:][at][:, None]))
    return -float(torch.cat(found).mean())


# Rows that a loader repeats to even out the ranks (accelerate#1674)


@pytest.mark.distributed
@pytest.mark.parametrize(("rows_per_rank", "padding_free"), [(2, False), (2, True), (3, False)])
def test_an_evaluation_over_two_ranks_counts_seven_rows_once(tmp_path, rows_per_rank, padding_free):
    def evaluate(processes):
        worker = Path(__file__).with_name("evaluation_worker.py")
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
        words = [str(worker), str(tmp_path), str(rows_per_rank), str(padding_free)]
        subprocess.run([*launch, *words], check=True, capture_output=True)
        return json.loads((tmp_path / "metrics.json").read_text())

    one, two = evaluate(1), evaluate(2)
    for name in ("eval_nll", "eval_qtarget/trust", "eval_qtarget/target_p_y", "eval_qtarget/grad_mass"):
        assert two[name] == pytest.approx(one[name], rel=1e-5), name


@pytest.mark.parametrize(("rank", "kept"), [(0, [True, True]), (1, [True, False]), (2, [False, False])])
@pytest.mark.parametrize("joined", [False, True], ids=["padded", "padding-free"])
def test_repeated_rows_have_no_labels_in_an_evaluation(rank, kept, joined):
    """Three rows are left for the last batch of three ranks with two rows each: the other three are repeated."""
    sampler = SimpleNamespace(num_processes=3, process_index=rank)
    loader = SimpleNamespace(total_batch_size=6, batch_sampler=sampler)
    state = SimpleNamespace(end_of_dataloader=True, remainder=3, active_dataloader=loader)
    accelerator = SimpleNamespace(num_processes=3, process_index=rank, gradient_state=state)
    labels = torch.tensor([[5, 6], [7, 8]])
    examples = None
    if joined:
        labels, examples = labels.view(1, 4), torch.tensor([[0, 0, 1, 1]])
    masked = without_repeats({"labels": labels}, examples, accelerator)["labels"].view(2, 2)
    assert [(row != -100).all().item() for row in masked] == kept
    state.end_of_dataloader = False
    assert without_repeats({"labels": labels}, examples, accelerator)["labels"] is labels


# Adapters over tied embeddings (peft#2018, transformers#45127): merging one writes into the matrix of the other

TIED = {
    "q_proj": {"target_modules": ["q_proj"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6, 7]},
}


def adapter(kind):
    options = TIED[kind]
    if not set(options) <= set(LoraConfig.__dataclass_fields__):
        pytest.skip(f"PEFT {peft.__version__} has no {' '.join(options)}")
    return LoraConfig(r=2, init_lora_weights=False, **options)


def adapted(folder, config):
    """A base with an adapter of random weights."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    from conftest import make_model, save

    return save(make_model(hidden=48, seed=2), tokenizer, tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("shared", [False, True], ids=["another student", "a student over the same base"])
def test_an_adapter_over_tied_embeddings_teaches_what_it_says_itself(train, base, tokenizer, tmp_path, kind, shared):
    teacher = adapted(base, adapter(kind))
    teacher.save_pretrained(tmp_path / "teacher", save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path / "teacher")
    student = {"model": base, "peft": LoraConfig(target_modules=["q_proj"])} if shared else {}
    trainer = train(teacher=str(tmp_path / "teacher"), loss="kd", **student)
    assert logged(trainer, "qtarget/teacher_nll") == pytest.approx(nll(teacher, trainer.train_dataset), abs=1e-4)


@pytest.mark.parametrize("kind", ["embedding", "tokens"])
def test_a_loaded_adapter_teaches_what_it_says_itself(train, base, kind):
    teacher = adapted(base, adapter(kind))
    trainer = train(teacher=teacher, loss="kd", go=False)
    expected = nll(copy.deepcopy(teacher), trainer.train_dataset)
    trainer.train()
    assert logged(trainer, "qtarget/teacher_nll") == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["head", "both", "tied"])
def test_a_loaded_adapter_of_the_head_is_refused(train, base, kind):
    with pytest.raises(
        ValueError, match=r"adapter on lm_head, which would be left out of its logits: pass the adapter"
    ):
        train(teacher=adapted(base, adapter(kind)), loss="kd", go=False)


@pytest.mark.skipif(peft.__version__.startswith("0.15."), reason="PEFT 0.15 puts no virtual tokens on this model")
@pytest.mark.parametrize("folder", [True, False], ids=["folder", "loaded"])
def test_a_teacher_with_virtual_tokens_is_read_behind_them(train, base, tokenizer, tmp_path, folder):
    teacher = adapted(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    expected = None
    if folder:
        teacher.save_pretrained(tmp_path / "teacher")
        tokenizer.save_pretrained(tmp_path / "teacher")
    trainer = train(teacher=str(tmp_path / "teacher") if folder else teacher, loss="kd", go=False)
    expected = nll(teacher if folder else copy.deepcopy(teacher), trainer.train_dataset)
    trainer.train()
    assert logged(trainer, "qtarget/teacher_nll") == pytest.approx(expected, abs=1e-4)


def test_a_teacher_whose_head_does_more_is_refused(train, tiny_model):
    teacher = tiny_model(seed=2)
    teacher.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match=r"teacher or reference, a Qwen3ForCausalLM, cannot be read.*off by"):
        train(teacher=teacher, loss="kd")


@pytest.mark.parametrize("kind", TIED)
def test_merged_folders_compute_what_the_adapter_computes(base, tokenizer, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    model = adapted(base, adapter(kind))
    model.save_pretrained("adapter", save_embedding_layers=False)
    tokenizer.save_pretrained("adapter")
    assert main(["merge", "--model_name_or_path", "adapter", "--output_dir", "merged"]) == 0
    ids = torch.arange(4, 40)[None]
    merged = AutoModelForCausalLM.from_pretrained("merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-3, rtol=1e-4)
    tied = json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"]
    assert tied == (kind == "q_proj")


def test_trained_tokens_alone_are_merged(base, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = TrainableTokensConfig(token_indices=[5, 6], target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    model = adapted(base, config)
    model.save_pretrained("adapter", save_embedding_layers=False)
    tokenizer.save_pretrained("adapter")
    assert main(["merge", "--model_name_or_path", "adapter", "--output_dir", "merged"]) == 0
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained("merged")(ids).logits
        torch.testing.assert_close(merged, model(ids).logits, atol=1e-3, rtol=1e-4)


# The reference of a model that arrives with a trained adapter (trl#4723)


@pytest.mark.parametrize("loss", ["sft_kl", "iw_sft"])
def test_the_reference_is_the_student_as_it_arrives(train, base, tmp_path, loss):
    adapted(base, LoraConfig(target_modules=["q_proj", "v_proj"])).save_pretrained(tmp_path / "stage1")
    bare = AutoModelForCausalLM.from_pretrained(base)
    student = PeftModel.from_pretrained(bare, tmp_path / "stage1", is_trainable=True)
    trainer = train(model=student, loss=loss, go=False, max_steps=2)
    assert isinstance(trainer._teacher, Initial)
    before = nll(student, trainer.train_dataset)
    trainer.train()
    assert logged(trainer, "qtarget/teacher_nll") == pytest.approx(before, abs=1e-4)
    assert logged(trainer, "loss") == pytest.approx(before, abs=1e-4)  # KL to itself is 0, and the ratio is 1
    held = trainer._teacher.read({"input_ids": torch.tensor([[5, 6, 7]])})
    moved = trainer.model.base_model.model.model(torch.tensor([[5, 6, 7]])).last_hidden_state
    assert (held.hidden - moved).abs().max() > 1e-3  # the student has moved away from its copy


def test_a_new_adapter_needs_no_copy_and_an_initialisation_that_rewrites_the_base_does(train, base):
    new = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    assert isinstance(train(model=new, loss="sft_kl", go=False)._teacher, AdaptersOff)
    pissa = train(model=base, peft=LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), loss="sft_kl")
    original = AutoModelForCausalLM.from_pretrained(base)
    assert logged(pissa, "qtarget/teacher_nll") == pytest.approx(nll(original, pissa.train_dataset), abs=1e-3)


def test_a_resumed_run_keeps_the_reference_that_it_had(train, base, tmp_path):
    def run():
        student = adapted(base, LoraConfig(target_modules=["q_proj"], lora_dropout=0.0)).train()
        return train(model=student, loss="sft_kl", go=False, max_steps=4, save_strategy="steps", save_steps=2)

    whole, resumed = run(), run()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# Turn markers are special and have no name (Gemma's <end_of_turn>)


def test_added_special_tokens_are_special(train, tokenizer):
    marked = copy.deepcopy(tokenizer)
    marked.add_tokens(["<turn>"], special_tokens=True)
    data = [{"prompt": "1+1=", "completion": "2<turn>"}] * 4
    options = {"loss": "dft", "data": data, "processor": marked}
    by_word, by_id = (
        logged(train(trust_token_ids=ids, **options), "qtarget/trust")
        for ids in (["special"], ["<turn>", "<|im_end|>", "<|im_start|>", "<|pad|>", "<|unk|>"])
    )
    assert by_word == pytest.approx(by_id)
    assert by_word > logged(train(**options), "qtarget/trust") + 0.1


# No label left (trl#6668): a run whose loss is 0 looks like a perfect one


def test_rows_without_labels_are_said_and_none_left_is_an_error(train, capsys):
    long, short = {"prompt": "x" * 40, "completion": "y"}, {"prompt": "x", "completion": "y"}
    train(loss="nll", data=[long] * 3 + [short] * 2, max_length=20, go=False)
    assert "3 of 5 rows have no label left after max_length=20" in capsys.readouterr().out
    train(loss="nll", data=[long] * 3 + [short] * 2, max_length=50, go=False)
    assert "no label left" not in capsys.readouterr().out
    for packing in (False, True):
        with pytest.raises(
            ValueError, match="None of the 3 rows of the train dataset has a label left after max_length"
        ):
            train(loss="nll", data=[long] * 3, max_length=20, packing=packing, go=False)


def test_batches_without_labels_are_counted_and_a_stream_without_any_stops(train, rows):
    none = {"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}
    some = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    options = {"loss": "nll", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    trainer = train(data=[some, none], max_length=None, **options)
    assert logged(trainer, "qtarget/unlabelled_batches") == 1
    first = train(data=[none, some], max_length=None, loss="nll", per_device_train_batch_size=1, max_steps=2, seed=1)
    assert first.state.global_step == 2  # whichever row comes first, one batch without labels stops nothing
    from datasets import IterableDataset

    stream = IterableDataset.from_generator(lambda: iter([none] * 4))
    args = TargetSFTConfig(
        "unused", loss="nll", use_cpu=True, bf16=False, report_to="none", max_steps=1, save_strategy="no",
        gradient_checkpointing=False, logging_steps=1, max_length=None,
    )  # fmt: skip
    stopped = TargetSFTTrainer(trainer.model, args, train_dataset=stream, processing_class=trainer._tokenizer)
    with pytest.raises(ValueError, match="batches so far has a labelled token"):
        stopped.train()


# Columns that mean something else (trl#5952)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("trust", "high", "Row 1 has 'high' in trust"),
        ("trust", 85, "Row 1 has 85 in trust.*gamma, a number from 0 to 1"),
        ("trust", -1.0, "Row 1 has -1 in trust"),
        ("trust", {"source": "web"}, "in trust"),
        ("token_weight", "heavy", "Row 1 has 'heavy' in token_weight"),
        ("reference_log_p_y", 0.5, "Row 1 has 0.5 in reference_log_p_y.*at most 0"),
        ("reference_mass", 1.5, "Row 1 has 1.5 in reference_mass"),
    ],
)
def test_a_column_outside_its_range_is_refused_by_row(train, rows, column, value, said):
    fine = {"trust": 0.5, "token_weight": 1.0, "reference_log_p_y": -1.0, "reference_mass": 0.5}[column]
    fine = {"source": "web"} if isinstance(value, dict) else str(fine) if isinstance(value, str) else fine
    data = [
        {**row, column: fine if i == 0 and not isinstance(fine, str | dict) else value}
        for i, row in enumerate(rows(4))
    ]
    said = said.replace("Row 1", "Row 0") if isinstance(fine, str | dict) else said
    with pytest.raises(ValueError, match=said):
        train(data=data, loss="dft", go=False)


def test_the_columns_that_are_read_are_said(train, rows, capsys):
    train(data=[{**row, "trust": 0.5, "other": 1} for row in rows(4)], loss="dft", go=False)
    assert "Columns of the data that are read beside the tokens: trust\n" in capsys.readouterr().out


# Several evaluation sets


def test_metrics_of_several_sets_carry_their_names(train, rows):
    sets = {name: Dataset.from_list(rows(4, seed=seed)) for name, seed in (("easy", 5), ("hard", 6))}
    trainer = train(
        loss="dft", eval_data=sets, eval_strategy="steps", eval_steps=1, max_steps=2, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="hard_nll", greater_is_better=False,
    )  # fmt: skip
    metrics = trainer.evaluate()
    for name, data in trainer.eval_dataset.items():
        assert metrics[f"eval_{name}_nll"] == pytest.approx(nll(trainer.model, data), abs=1e-4)
        assert f"eval_{name}_qtarget/trust" in metrics
    assert "eval_nll" not in metrics
    best = min(entry["eval_hard_nll"] for entry in trainer.state.log_history if "eval_hard_nll" in entry)
    assert trainer.state.best_metric == pytest.approx(best)


# Rules that look at other tokens


@pytest.mark.parametrize(
    "rule",
    [lambda t: t.p_y / t.p_y.max(), lambda t: (t.p_y >= t.p_y.median()).double(), lambda t: t.p_y * len(t.p_y)],
    ids=["max", "median", "count"],
)
def test_a_rule_that_looks_at_other_tokens_is_refused(rule):
    hidden, weight = torch.randn(6, 4), torch.randn(9, 4)
    labels = torch.randint(9, (6,))
    for part in ("trust", "scale"):
        with pytest.raises(ValueError, match=r"each token's number from that token alone, or set whole_batch=True"):
            qtarget_loss(hidden, weight, labels, Target(**{part: rule}))
    qtarget_loss(hidden, weight, labels, Target(trust=rule, whole_batch=True))


# Ids of a top-K teacher, and labels that no head has


def taught(ids, log_probs, labels, name="kd"):
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    out = qtarget_loss(hidden, weight, torch.tensor(labels), build(name), teacher=TopKLogits(ids, log_probs))
    return out, torch.autograd.grad(out.loss, weight)[0]


@pytest.mark.parametrize("name", ["kd", "target_sft", "sft_kl"])
@pytest.mark.parametrize("label", [0, 3, 5])
@pytest.mark.parametrize("real", [0, 4], ids=["beside a real id 0", "where id 0 is in the tail"])
def test_padding_with_any_id_changes_nothing(name, label, real):
    ids, log_probs = torch.tensor([[real, 3]]), torch.tensor([[0.5, 0.2]], dtype=torch.float64).log()
    padded_ids = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], dim=-1)
    padded = torch.cat([log_probs, torch.full((1, 3), -torch.inf, dtype=torch.float64)], dim=-1)
    (plain, gradient), (other, same) = taught(ids, log_probs, [label], name), taught(padded_ids, padded, [label], name)
    for field in ("loss", "log_p_y", "entropy", "target_p_y", "moved", "grad_mass"):
        torch.testing.assert_close(getattr(other, field), getattr(plain, field))
    torch.testing.assert_close(same, gradient)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([[2, 2, 3]], "has 2 twice in row 0"),
        ([[2, 9, 3]], r"has 9 in row 0: ids lie in \[0, 9\)"),
        ([[-1, 2, 3]], "has -1"),
    ],
)
def test_ids_that_cannot_be_are_refused(ids, said):
    log_probs = torch.tensor([[0.3, 0.3, 0.2]], dtype=torch.float64).log()
    with pytest.raises(ValueError, match=said):
        taught(torch.tensor(ids), log_probs, [1])
    with pytest.raises(ValueError, match="-inf throughout row 0"):
        taught(torch.tensor([[1, 2, 3]]), torch.full((1, 3), -torch.inf, dtype=torch.float64), [1])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("label", [9, -1, -101])
def test_labels_outside_the_vocabulary_are_refused(backend, label):
    if backend == "triton":
        pytest.importorskip("triton")
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4)
    with pytest.raises(ValueError, match=rf"labels has {label} in row 1: labels lie in \[0, 9\)"):
        qtarget_loss(hidden, weight, torch.tensor([-100, label, 2]), build("nll"), backend=backend)


# A check that an all-zero loss passes, where labels are improbable


@pytest.mark.parametrize("wrong", ["no loss", "no gradient", "half the gradient"])
def test_the_first_step_notices_a_loss_that_is_zero_or_has_another_gradient(train, tiny_model, monkeypatch, wrong):
    """At 32k columns dft's loss is p * nll, about 1e-3: far below any absolute tolerance."""
    from trl_qtarget.training import kernels

    def broken(hidden, *args, **kwargs):
        out = qtarget_loss(hidden, *args, **kwargs)
        factor = {"no loss": 0.0, "no gradient": 0.0, "half the gradient": 0.5}[wrong]
        loss = out.loss * factor + (out.loss * (1 - factor)).detach()
        return out.__class__(
            **{**out.__dict__, "loss": loss, **({"token_loss": 0 * out.token_loss} if wrong == "no loss" else {})}
        )

    monkeypatch.setattr(kernels, "qtarget_loss", broken)
    with pytest.raises(RuntimeError, match="The fused loss differs from its specification"):
        train(model=tiny_model(vocab_size=32_000, initializer_range=0.02), loss="dft")
    monkeypatch.undo()
    train(model=tiny_model(vocab_size=32_000, initializer_range=0.02), loss="dft")


# A copy of a model that a trainer has seen


@pytest.mark.parametrize("own_forward", [False, True], ids=["class's forward", "instance's forward"])
def test_a_copied_model_runs_its_own_weights(train, tiny_model, own_forward):
    model = tiny_model(seed=1)
    if own_forward:
        model.forward = model.forward
    trainer = train(model=model, loss="dft", go=False)
    copied = copy.deepcopy(trainer.model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert (copied(ids).logits - trainer.model(ids).logits).abs().max() > 1e-2
        read = copied(ids, qtarget=lambda hidden, labels, head, aux: (hidden, head))
        torch.testing.assert_close(read[0] @ read[1].weight.T, copied(ids).logits)


# The tokenizer of another revision


def test_tokenizers_are_compared_at_the_revisions_of_their_models(train, student_dir, teacher_dir, monkeypatch, rows):
    asked = {}
    load = AutoTokenizer.from_pretrained

    def spy(name, *args, **kwargs):
        asked.setdefault(name, kwargs.get("revision"))
        return load(name, *args, **kwargs)

    monkeypatch.setattr("trl_qtarget.training.checks.AutoTokenizer", SimpleNamespace(from_pretrained=spy))
    args = TargetSFTConfig(
        "unused", use_cpu=True, bf16=False, report_to="none", model_init_kwargs={"revision": "v1"},
        teacher_model_name_or_path=teacher_dir, teacher_model_revision="v2",
    )  # fmt: skip
    TargetSFTTrainer(student_dir, args, train_dataset=Dataset.from_list(rows(4)))
    assert asked == {student_dir: "v1", teacher_dir: "v2"}


# Arguments of Python code


def test_a_function_or_a_target_is_a_loss(train):
    """Both train as dft does, and the configuration can be pickled, as a checkpoint pickles it."""

    def half(share: float = 0.5) -> Target:
        return Target(trust=share)

    steps = {}
    for name, loss in {"target": Target(trust=lambda t: t.p_y), "function": PRESETS["dft"].make}.items():
        trainer = train(loss=loss)
        steps[name] = logged(trainer, "grad_norm")
        pickle.dumps(trainer.args)
    assert steps["target"] == steps["function"] == logged(train(loss="dft"), "grad_norm")
    quarter = train(loss=half, loss_kwargs={"share": 0.25})
    assert logged(quarter, "qtarget/trust") == pytest.approx(0.25)
    with pytest.raises(ValueError, match="A loss is a name, a function that returns a Target, or a Target, got 3"):
        TargetSFTConfig("unused", loss=3)


def test_a_misspelt_teacher_is_named(train, tiny_model, tokenizer, rows):
    with pytest.raises(TypeError, match=r"takes no argument 'teacher'\. Did you mean teacher_model\?"):
        TargetSFTTrainer(tiny_model(), train_dataset=Dataset.from_list(rows(4)), teacher=tiny_model())


def test_top_k_is_the_dense_teacher_with_its_tail_written_out():
    """The definition of the tail, by hand, at a label outside of the ids."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(2, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    ids, labels = torch.tensor([[1, 2], [3, 4]]), torch.tensor([5, 3])
    log_probs = torch.tensor([[0.5, 0.3], [0.6, 0.1]], dtype=torch.float64).log()
    p = (hidden @ weight.T).softmax(-1)
    outside = torch.ones_like(p).scatter(-1, ids, 0)
    tail = (1 - log_probs.exp().sum(-1, keepdim=True)) * p * outside / (p * outside).sum(-1, keepdim=True)
    q = tail.scatter(-1, ids, log_probs.exp())
    sparse = qtarget_loss(hidden, weight, labels, build("kd"), teacher=TopKLogits(ids, log_probs))
    dense = ProjectedLogits(torch.eye(2, dtype=torch.float64), q.log().T.contiguous())
    torch.testing.assert_close(sparse.loss, qtarget_loss(hidden, weight, labels, build("kd"), teacher=dense).loss)


def test_a_token_added_without_resizing_is_named(train, tiny_model, tokenizer):
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([f"<new{i}>" for i in range(3)])
    student = tiny_model(vocab_size=len(tokenizer))
    train(model=student, processor=larger, loss="nll", go=False)  # no row has one of them
    with pytest.raises(ValueError, match=r"<new1>.*student"):
        train(
            model=student, processor=larger, loss="nll", data=[{"prompt": "1", "completion": "<new1>"}] * 2, go=False
        )
