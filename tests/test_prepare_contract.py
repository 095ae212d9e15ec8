"""The contract behind token columns: TRL's `SFTTrainer._prepare_dataset` moves vectors as it moves ids.

`trl_qtarget.data.columns.prepared` calls the method a second time with each token as [id, number], so that TRL itself
truncates, drops, packs and shuffles the numbers together with their tokens. No signature promises that TRL takes
vectors. A test that fails here names what TRL has changed, and `prepared` must then be changed with it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import trl
from datasets import Dataset, IterableDataset
from trl import SFTConfig, SFTTrainer


LENGTHS = (7, 3, 12, 5, 9, 4)
LONGEST = 8
MASKED = 2  # labels at the start of each row
ALL_MASKED = 1  # a row without any label


def row(number: int, length: int) -> dict[str, Any]:
    """Ids that occur once in the dataset, and the text that an untokenized row would have."""
    ids = list(range(100 * (number + 1), 100 * (number + 1) + length))
    masked = length if number == ALL_MASKED else MASKED
    return {"text": "not to be read", "input_ids": ids, "labels": [-100] * masked + ids[masked:]}


ROWS = [row(*numbered) for numbered in enumerate(LENGTHS)]
VECTORS = [{**r, "input_ids": [[float(i), i / 8] for i in r["input_ids"]]} for r in ROWS]


class Untouched:
    """A tokenizer that must not be called."""

    eos_token = "</s>"

    def fail(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the tokenizer was called")

    __call__ = apply_chat_template = encode = fail


@pytest.fixture(params=[False, True], ids=["rows", "stream"])
def prepare(request, tiny_model, tokenizer, tmp_path) -> Callable[..., list[dict[str, Any]]]:
    """`prepare(rows, promise, **options)` returns the rows as TRL prepares them; an error breaks `promise`."""

    def run(rows, promise, packing=False, **options):
        args = SFTConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
            max_length=LONGEST, packing=packing, **options,
        )  # fmt: skip
        trainer = SFTTrainer(tiny_model(), args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
        dataset = IterableDataset.from_generator(lambda: iter(rows)) if request.param else Dataset.from_list(rows)
        try:
            return list(trainer._prepare_dataset(dataset, Untouched(), args, packing, None, "train"))
        except Exception as error:
            raise broken(promise) from error

    return run


def broken(promise: str) -> AssertionError:
    return AssertionError(f"SFTTrainer._prepare_dataset of TRL {trl.__version__} no longer {promise}")


def check(prepare, promise, **options):
    """Check that TRL moves vectors as it moves ids, whole, with labels beside their tokens, and return the ids."""
    plain, moved = prepare(ROWS, promise, **options), prepare(VECTORS, promise, **options)
    ids = [[int(token[0]) for token in r["input_ids"]] for r in moved]
    if ids != [r["input_ids"] for r in plain]:
        raise broken(f"{promise}: tokens that are vectors end up elsewhere than ids")
    if any(number != id_ / 8 for r in moved for id_, number in r["input_ids"]):
        raise broken(f"{promise}: the numbers of a vector are torn from its id")
    if [r["labels"] for r in moved] != [r["labels"] for r in plain]:
        raise broken("leaves labels alone: those beside vectors differ from those beside ids")
    labelled = [pair for r, tokens in zip(moved, ids, strict=True) for pair in zip(r["labels"], tokens, strict=True)]
    if any(label not in (-100, id_) for label, id_ in labelled):
        raise broken("leaves labels aligned with their tokens")
    if [r.get("seq_lengths") for r in moved] != [r.get("seq_lengths") for r in plain]:
        raise broken(f"{promise}: the lengths of packed rows differ")
    return ids


def test_trl_does_not_tokenize_rows_that_have_input_ids(prepare):
    """(a) The text beside `input_ids` is not read, and the labels that are there are kept."""
    check(prepare, "takes rows with input_ids for tokenized ones")


def test_trl_truncates_vectors_at_the_end(prepare):
    """(b) `keep_start` keeps the first tokens whole, and a row without labels is dropped as one of ids is."""
    ids = check(prepare, "truncates rows of vectors", truncation_mode="keep_start")
    kept = [r["input_ids"][:LONGEST] for i, r in enumerate(ROWS) if i != ALL_MASKED]
    if ids != kept:
        raise broken("keeps the first max_length tokens of each row, and drops rows without labels")


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_trl_packs_vectors_whole(prepare, strategy):
    """(c) Each strategy fills rows of at most max_length tokens with whole vectors."""
    ids = check(prepare, f"packs vectors with {strategy}", packing=True, packing_strategy=strategy)
    kept = sum(min(length, LONGEST) if strategy == "bfd" else length for length in LENGTHS)
    if max(map(len, ids)) > LONGEST or sum(map(len, ids)) != kept:
        raise broken(f"packs vectors with {strategy}: rows have other lengths")


def test_trl_shuffles_vectors_as_it_shuffles_ids(prepare):
    """(d) The order depends on the seed alone, before packing and without."""
    ids = check(prepare, "shuffles rows by its seed", shuffle_dataset=True)
    assert sorted(ids) == sorted(r["input_ids"][:LONGEST] for i, r in enumerate(ROWS) if i != ALL_MASKED)
    check(prepare, "shuffles rows by its seed", shuffle_dataset=True, packing=True)


@pytest.mark.parametrize("change", ["tokenizes", "tears", "shifts"])
def test_a_broken_contract_is_named(prepare, monkeypatch, change):
    """The tests above say which release of TRL has broken the contract, whichever part of it breaks."""
    own = SFTTrainer._prepare_dataset

    def torn(r):
        return {"input_ids": [[token[0], 0.0] if isinstance(token, list) else token for token in r["input_ids"]]}

    def shifted(r):
        return {"labels": [*r["labels"][1:], -100]}

    def changed(self, dataset, processing_class, *given):
        if change == "tokenizes":
            processing_class("text")
        else:
            dataset = dataset.map({"tears": torn, "shifts": shifted}[change])
        return own(self, dataset, processing_class, *given)

    monkeypatch.setattr(SFTTrainer, "_prepare_dataset", changed)
    with pytest.raises(AssertionError, match=rf"_prepare_dataset of TRL {trl.__version__} no longer"):
        check(prepare, "truncates rows of vectors")
