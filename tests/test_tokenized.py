"""Rows that arrive tokenized: the first wrong one is named, in a table and in the first row of a stream."""

import datasets
import pytest
from datasets import Dataset, Features, IterableDataset

from trl_qtarget.data import tokenized
from trl_qtarget.data.tokenized import check_tokenized


GOOD = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [], "labels": []}]
WRONG = [
    ([{"input_ids": [5], "labels": 5}], "Row 0 of the train dataset has 5 in labels: give a list of whole numbers"),
    ([{"input_ids": [5], "labels": 0.5}], "Row 0 of the train dataset has 0.5 in labels"),
    ([{"input_ids": [5], "labels": [5.0]}], r"Row 0 of the train dataset has \[5.0\] in labels"),
    ([{"input_ids": [5], "labels": [True]}], r"Row 0 of the train dataset has \[True\] in labels"),
    ([{"input_ids": [5], "labels": [[5]]}], r"Row 0 of the train dataset has \[\[5\]\] in labels"),
    ([{"input_ids": "ab", "labels": [5]}], "Row 0 of the train dataset has 'ab' in input_ids"),
    ([{"input_ids": [5], "labels": None}, *GOOD], "Row 0 of the train dataset has None in labels"),
    ([{"input_ids": [5, 6], "labels": [5, None]}, *GOOD], r"Row 0 of the train dataset has \[5, None\] in labels"),
    (
        [{"input_ids": [5, 6], "labels": [6]}, *GOOD],
        "Row 0 of the train dataset has 2 input_ids and 1 labels: give one",
    ),
]


@pytest.mark.parametrize(("rows", "said"), WRONG)
def test_the_first_wrong_row_is_named(rows, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        check_tokenized("train", Dataset.from_list(rows))
    with pytest.raises(ValueError, match=f"^{said}"):
        check_tokenized("train", IterableDataset.from_generator(lambda: iter(rows)))
    with pytest.raises(ValueError, match=said.replace("the train", r"the eval \(a\)")):
        check_tokenized("eval", {"b": Dataset.from_list(GOOD), "a": Dataset.from_list(rows)})


@pytest.mark.parametrize("number", [0, 2, 3, 6])
def test_its_number_is_that_of_the_dataset(number, monkeypatch):
    monkeypatch.setattr(tokenized, "SCANNED", 3)
    for wrong in ({"input_ids": [5, 6], "labels": [6]}, {"input_ids": [5], "labels": None}):
        rows = [GOOD[0]] * 7
        rows[number] = wrong
        with pytest.raises(ValueError, match=f"^Row {number} of"):
            check_tokenized("train", Dataset.from_list(rows))
        with pytest.raises(ValueError, match=r"^Row 1 of"):
            check_tokenized("train", Dataset.from_list(rows).select([(number + 1) % 7, number]))


def test_other_data_is_left_alone():
    numbers = {
        name: datasets.Sequence(datasets.Value(kind)) for name, kind in (("input_ids", "int32"), ("labels", "int8"))
    }
    for good in (
        Dataset.from_list(GOOD),
        Dataset.from_list(GOOD, features=Features(numbers)),
        Dataset.from_list(GOOD).with_format("torch"),
        Dataset.from_dict({"input_ids": [[5, 6]], "other": [1.5]}),
        Dataset.from_dict({"prompt": ["a"], "labels": [1]}),
        Dataset.from_dict({"input_ids": [], "labels": []}),
        IterableDataset.from_generator(lambda: iter(GOOD)),
        {"a": Dataset.from_list(GOOD)},
        [*GOOD],
        None,
    ):
        check_tokenized("train", good)
