"""Token columns: one number beside each token, through everything that cuts, packs, pads and streams tokens."""

import math
import pickle

import compare
import pytest
import torch
from compare import logged
from datasets import Dataset, IterableDataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_qtarget import ProjectedLogits, TargetSFTConfig, TargetSFTTrainer, build, qtarget_loss, reference_loss
from trl_qtarget.data.collators import TokenColumnCollator
from trl_qtarget.loss import per_token


PACKED = {"packing": True, "max_length": 256}


@pytest.fixture
def train(tiny_model, tokenizer, tmp_path):
    """`train(rows, loss=..., **options)` trains a fresh tiny student for one step, and returns the trainer."""

    def run(data, model=None, go=True, eval_data=None, **options):
        args = TargetSFTConfig(**{
            "output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
            "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "max_steps": 1,
            "learning_rate": 1e-2, "lr_scheduler_type": "constant", "per_device_train_batch_size": 4, **options,
        })  # fmt: skip
        data = Dataset.from_list(data) if isinstance(data, list) else data
        trainer = TargetSFTTrainer(
            tiny_model(seed=1) if model is None else model,
            args,
            train_dataset=data,
            eval_dataset=eval_data,
            processing_class=tokenizer,
        )
        if go:
            trainer.train()
        return trainer

    return run


@pytest.fixture
def tokenized(tokenizer, rows):
    """`tokenized(n, **columns)`: n rows of ids, with columns made by `f(ids)` of each row."""

    def make(n=4, **columns):
        out = []
        for row in rows(n):
            prompt, both = (tokenizer(x)["input_ids"] for x in (row["prompt"], row["prompt"] + row["completion"]))
            labels = [-100] * len(prompt) + both[len(prompt) :]
            out.append({"input_ids": both, "labels": labels, **{name: f(both) for name, f in columns.items()}})
        return out

    return make


def steps(trainer):
    return logged(trainer, "loss", "grad_norm", "qtarget/trust")


def same(a, b, rel=1e-4):
    compare.same(steps(a), steps(b), rel, where="loss/per_token.py, data/columns.py, data/collators.py")


def same_weights(a, b, atol=1e-5):
    """Two trained models; parameters after Adam would hide a difference in size, so this goes by SGD."""
    for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=1e-4)


def graded(ids):
    """Another number for each token, which no shift or neighbour can be mistaken for."""
    return [0.1 + (7 * i + id_) % 10 / 10 for i, id_ in enumerate(ids)]


def patchy(ids):
    return [None if i % 3 else x / 2 for i, x in enumerate(graded(ids))]


# Preparation, with TRL's own as the judge


def ready(train, data, **options):
    """What the trainer makes of the rows."""
    dataset = train(data, loss="nll", go=False, **options).train_dataset
    return [{k: v for k, v in row.items() if k != "seq_lengths"} for row in dataset]


keep_end_is_deprecated = pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation:FutureWarning")


@keep_end_is_deprecated
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 9},
        {"max_length": 9, "truncation_mode": "keep_end"},
        {"packing": True, "max_length": 40},
        {"packing": True, "max_length": 9},
        {"packing": True, "max_length": 9, "packing_strategy": "bfd_split"},
        {"packing": True, "max_length": 9, "packing_strategy": "wrapped"},
        {"shuffle_dataset": True},
        {"packing": True, "max_length": 40, "shuffle_dataset": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
def test_numbers_stay_with_their_tokens(train, tokenized, options, stream):
    """A number made from its id is found beside that id, wherever TRL has put it."""
    plain = tokenized(8)
    data = [{**r, "token_weight": [x / 8 for x in r["input_ids"]], "trust": patchy(r["input_ids"])} for r in plain]
    kind = (lambda rows: IterableDataset.from_generator(lambda: iter(rows))) if stream else Dataset.from_list
    ours, theirs = ready(train, kind(data), **options), ready(train, kind(plain), **options)
    assert [r["input_ids"] for r in ours] == [r["input_ids"] for r in theirs]
    assert [r["labels"] for r in ours] == [r["labels"] for r in theirs]
    for row in ours:
        assert row["token_weight"] == [x / 8 for x in row["input_ids"]]
        assert len(row["trust"]) == len(row["input_ids"])
    known = [x for r in data for x in r["trust"] if x is not None]
    kept = [x for r in ours for x in r["trust"] if x is not None and not math.isnan(x)]
    assert set(kept) <= set(known)
    assert len(kept) > 0


def test_one_number_for_the_row_needs_no_tokens(train, rows):
    halves = [{**row, "token_weight": i / 8} for i, row in enumerate(rows(8))]
    for row in ready(train, halves, packing=True, max_length=24):
        assert len(set(row["token_weight"])) >= 1
        assert len(row["token_weight"]) == len(row["input_ids"])
    texts = [{"text": r["prompt"] + r["completion"], "token_weight": 2} for r in rows(4)]
    assert {x for row in ready(train, texts) for x in row["token_weight"]} == {2}


@keep_end_is_deprecated
@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"token_weight": lambda ids: [1.0, 1.0]}, {}, "input_ids and 2 numbers in token_weight"),
        ({"token_weight": lambda ids: [math.nan] * len(ids)}, {}, "no finite number in token_weight"),
        ({"token_weight": lambda ids: None}, {}, "no finite number in token_weight"),
        ({"reference_log_p_y": graded}, {"truncation_mode": "keep_end"}, "set truncation_mode to 'keep_start'"),
        ({"reference_mass": graded}, {**PACKED, "packing_strategy": "wrapped"}, "set packing_strategy to 'bfd'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_right_is_refused(train, tokenized, columns, options, message):
    with pytest.raises(ValueError, match=message):
        train(tokenized(**columns), loss="nll", go=False, **options)


def test_several_numbers_without_tokens_are_refused(train, rows):
    with pytest.raises(ValueError, match="several numbers in trust and no input_ids"):
        train([{**row, "trust": [1.0]} for row in rows(4)], loss="nll", go=False)


def test_rows_that_nobody_prepared_are_collated_all_the_same():
    collate = TokenColumnCollator(DataCollatorForLanguageModeling(pad_token_id=0))
    batch = collate([
        {"input_ids": [5, 6, 7], "token_weight": [1, 2, 3], "trust": 0.5},
        {"input_ids": [8, 9], "token_weight": [4, 5], "trust": [None, 1]},
    ])  # fmt: skip
    assert batch["token_weight"].tolist() == [[2, 3, 0], [5, 0, 0]]  # where the tokens are predicted
    assert batch["trust"][:, :1].tolist() == [[0.5], [1]]
    flat = TokenColumnCollator(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True))
    assert flat([{"input_ids": [5, 6], "trust": 0.5}, {"input_ids": [7], "trust": 1}])["trust"].tolist() == [
        [0.5, 1, 0]
    ]
    with pytest.raises(ValueError, match="2 input_ids and 1 numbers in trust"):
        collate([{"input_ids": [5, 6], "trust": [0.5]}])


# Training


@pytest.mark.parametrize("loss", ["dft", "nll", "critical_token"])
@pytest.mark.parametrize(
    "options",
    [
        PACKED,
        {"padding_free": True, "max_length": None},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"dataloader_num_workers": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"remove_unused_columns": False},
    ],
    ids=lambda o: next(iter(o)),
)
def test_one_step_is_one_step_however_it_is_cut(train, tokenized, loss, options):
    data = tokenized(token_weight=graded, trust=patchy)
    sgd = {"loss": loss, "optim": "sgd", "max_grad_norm": 1e9}
    whole, cut = train(data, **sgd), train(data, **sgd, **options)
    same(cut, whole)
    same_weights(cut, whole)


def test_streaming_is_the_same_training(train, tokenized):
    data = tokenized(8, token_weight=graded, trust=patchy)
    stream = IterableDataset.from_generator(lambda: iter(data))
    whole = {"loss": "dft", "per_device_train_batch_size": 8}  # so that their order does not matter
    same(train(stream, **whole), train(data, **whole))


def test_trust_is_gamma_wherever_it_is_a_number(train, tokenized):
    always = train(tokenized(trust=lambda ids: 0.25), loss="dft", trust_floor=0.9)
    assert steps(always)[0][2] == pytest.approx(0.25)
    nll = train(tokenized(trust=lambda ids: 1.0), loss="dft")
    same(nll, train(tokenized(), loss="nll"))


def test_evaluation_reads_the_columns_too(train, tokenized):
    data = tokenized(4, trust=graded, token_weight=graded)
    trainer = train(data, loss="dft", eval_data=Dataset.from_list(data), go=False)
    one, two = trainer.evaluate(), trainer.evaluate(Dataset.from_list(data))
    assert one["eval_loss"] == pytest.approx(two["eval_loss"])
    plain = trainer.evaluate(Dataset.from_list(tokenized(4)))
    assert one["eval_loss"] != pytest.approx(plain["eval_loss"])


# The loss of it


@pytest.mark.parametrize("name", ["dft", "asft", "gem", "kd_hybrid", "talr", "beyond_log"])
def test_a_given_trust_is_the_specified_one(name):
    torch.manual_seed(0)
    hidden, weight, other = (torch.randn(*shape, dtype=torch.float64) for shape in ((9, 4), (13, 4), (13, 4)))
    labels, trust = torch.randint(13, (9,)), torch.rand(9).double()
    labels[2], trust[4:6] = -100, math.nan
    hidden.requires_grad_()
    taught = {"teacher": ProjectedLogits(hidden.detach(), other)} if build(name).reads_logits() else {}
    out = qtarget_loss(hidden, weight, labels, build(name), trust=trust, **taught)
    (ours,) = torch.autograd.grad(out.loss, hidden)
    logits = {"teacher_logits": hidden.detach() @ other.T} if taught else {}
    expected = reference_loss(hidden @ weight.T, labels, build(name), trust=trust, **logits)
    (theirs,) = torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(ours, theirs)
    given = (labels != -100) & ~trust.isnan()
    torch.testing.assert_close(out.trust[given], trust[given])


# What is known of a reference


def referenced(tokenized, model, name, tokenizer, n=4):
    """The rows with what the model says of each of their tokens."""
    out = []
    for row in tokenized(n):
        log_p = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1).detach().double()
        next_ids = torch.tensor(row["input_ids"][1:])[:, None]
        value = log_p.gather(-1, next_ids)
        if name == "reference_mass":
            value = log_p.exp().masked_fill(log_p > value, 0).sum(-1, keepdim=True)
        out.append({**row, name: [math.nan, *value[:, 0].tolist()]})
    return out


MASS = {"loss": "prift", "loss_kwargs": {"statistic": "mass"}}


@pytest.mark.parametrize("options", [{}, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("loss", "column"),
    [
        ({"loss": "prift"}, "reference_log_p_y"),
        (MASS, "reference_mass"),
        ({"loss": "iw_sft"}, "reference_log_p_y"),
    ],
    ids=["prob", "mass", "iw_sft"],
)
def test_a_reference_may_be_a_column(train, tiny_model, tokenizer, tokenized, loss, column, options):
    data = referenced(tokenized, tiny_model(seed=1), column, tokenizer)
    held = train(data, **loss, **options, max_steps=3)
    assert held._teacher is None
    loaded = train(tokenized(), **loss, max_steps=3)
    assert loaded._teacher is not None
    same(held, loaded)


def test_a_column_of_no_use_to_the_loss_is_not_read(train, tokenized):
    """psft has a reference of its own, which is no column's to replace."""
    data = tokenized(reference_log_p_y=lambda ids: [-3.0] * len(ids))
    for loss in ("psft", "nll"):
        same(train(data, loss=loss), train(tokenized(), loss=loss), 1e-6)


def test_a_reference_that_one_dataset_lacks_is_loaded(train, tiny_model, tokenizer, tokenized):
    data, bare = (
        referenced(tokenized, tiny_model(seed=1), "reference_log_p_y", tokenizer),
        Dataset.from_list(tokenized()),
    )
    both = train(data, loss="prift", eval_data=bare, max_steps=2)
    assert both._teacher is not None
    with pytest.raises(ValueError, match="log-probability under another model: reference_log_p_y"):
        train(data, loss="prift", go=False).evaluate(bare)
    with pytest.raises(ValueError, match="reference_mass"):
        train(referenced(tokenized, tiny_model(seed=1), "reference_mass", tokenizer), **MASS, go=False).evaluate(bare)


# Trajectories


@pytest.mark.parametrize("loss", ["iw_sft", "talr"])
def test_packed_trajectories_are_the_rows(train, tokenized, loss):
    """Three steps over the same four rows: weights have moved away from one by the second."""
    options = {"loss": loss, "max_steps": 3, "optim": "sgd", "max_grad_norm": 1e9, "learning_rate": 1e-3}
    padded, packed = train(tokenized(), **options), train(tokenized(), **options, **PACKED)
    same(packed, padded)
    same_weights(packed, padded)
    if loss == "iw_sft":
        assert steps(padded)[2][2] != pytest.approx(1, abs=1e-3)


def test_wrapped_packing_hides_where_trajectories_begin(train, tokenized):
    with pytest.raises(ValueError, match="cannot tell trajectories apart"):
        train(tokenized(), loss="iw_sft", packing_strategy="wrapped", **PACKED, go=False)


def test_a_collator_reaches_workers_that_are_spawned(tokenizer):
    inner = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    sent = pickle.loads(pickle.dumps(TokenColumnCollator(inner)))
    assert sent.pad_token_id == tokenizer.pad_token_id
    rows = [{"input_ids": [5, 6], "labels": [5, 6], "trust": 0.25}, {"input_ids": [7], "labels": [7], "trust": 1}]
    batch = sent(rows)
    assert batch["trust"].tolist() == [[0.25, 0], [0, 0]]


def test_every_column_is_documented_by_name():
    assert all(f"\n    {name} " in per_token.__doc__ for name in per_token.TOKEN_COLUMNS)


# What trust is for


def test_trusted_ends_stop_what_would_be_repeated_for_ever(train, tiny_model, rows, tokenizer):
    """dft never learns an end that the model finds impossible; trusted, or above a floor, it is learnt."""
    four = rows(4)

    def endless():
        model = tiny_model(seed=1, tie=False)
        with torch.no_grad():  # one feature that all tokens share, and that speaks against the end
            model.model.embed_tokens.weight[:, 0] = 8.0
            model.lm_head.weight[tokenizer.eos_token_id, 0] = -20.0
        return model

    def ended(**options):
        model = train(four, model=endless(), loss="dft", max_steps=60, **options).model.eval()
        out = 0
        for row in four:
            prompt = tokenizer(row["prompt"], return_tensors="pt")
            new = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
            out += tokenizer.eos_token_id in new.tolist()
        return out

    assert ended() == 0
    assert ended(trust_token_ids=["special"]) == 4
    assert ended(trust_floor=0.1) == 4
