"""Data of a recipe: what can be read, and that reading leaves nothing in the folder of the data."""

import json
from types import SimpleNamespace

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from trl import DatasetMixtureConfig, ScriptArguments
from trl.scripts.utils import DatasetConfig

from trl_qtarget.data.formats import wrong_columns, wrong_row
from trl_qtarget.data.loading import load_splits


@pytest.fixture
def load(tmp_path, monkeypatch):
    """`load(name, datasets=None, evaluates=False, **script)`: the splits of a recipe in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(name=None, datasets=None, evaluates=False, **script):
        training = SimpleNamespace(
            eval_strategy="steps" if evaluates else "no", dataset_kwargs=None, dataset_text_field="text"
        )
        arguments = ScriptArguments(dataset_name=name, **script)
        arguments.dataset_conversation = None
        return load_splits(arguments, training, DatasetMixtureConfig(datasets=datasets or []))

    return run


@pytest.fixture
def saved(tmp_path, rows):
    """The rows as `Dataset.save_to_disk`, as `DatasetDict.save_to_disk`, in a folder, and in a file."""
    data = Dataset.from_list(rows(8))
    data.save_to_disk(tmp_path / "one", num_shards=2)
    DatasetDict({"train": data.select(range(6)), "test": data.select(range(6, 8))}).save_to_disk(tmp_path / "several")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text("\n".join(map(json.dumps, rows(8))))
    return rows(8)


def listed(folder):
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["one", "folder", "folder/train.jsonl"])
def test_the_ways_to_give_data(load, saved, tmp_path, name, streaming):
    before = listed(tmp_path)
    train, evaluation = load(name, dataset_streaming=streaming)
    assert list(train) == saved
    assert evaluation is None
    assert next(iter(train.map(lambda row: {"more": 1})))["more"] == 1
    assert listed(tmp_path) == before


def test_a_folder_with_the_name_of_a_reader_is_that_folder(load, saved, tmp_path):
    """`datasets` would take the name for a reader, and read every file of the working directory with it."""
    (tmp_path / "folder").rename(tmp_path / "text")
    assert list(load("text")[0]) == saved
    assert list(load(datasets=[DatasetConfig(path="text")])[0]) == saved
    with pytest.raises(ValueError, match="json is a reader, and nothing says which files"):
        load("json")


def test_splits_of_a_saved_dictionary(load, saved):
    train, evaluation = load("several", evaluates=True)
    assert [*train, *evaluation] == saved
    with pytest.raises(ValueError, match="The data has no split 'test', it has 'train'"):
        load("one", evaluates=True)


def test_saved_data_in_a_mixture(load, saved):
    entries = [
        DatasetConfig(path="one", split="train[:25%]"),
        DatasetConfig(path="several", split="test"),
        DatasetConfig(path="folder/train.jsonl", columns=["prompt", "completion"]),
    ]
    assert list(load(datasets=entries)[0]) == [*saved[:2], *saved[6:], *saved]
    assert entries[0].path == "one"


def test_types_of_saved_columns_are_kept(load, tmp_path):
    features = Features({"text": Value("string"), "kind": ClassLabel(names=["sum", "word"])})
    Dataset.from_dict({"text": ["a", "b"], "kind": [0, 1]}, features=features).save_to_disk(tmp_path / "typed")
    assert load("typed")[0].features == features


TURN = {"role": "user", "content": "a"}
FROM = {"from": "human", "value": "a"}


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a"},
        {"body": "a"},
        {"prompt": "a", "completion": "b"},
        {"prompt": [TURN], "completion": [TURN]},
        {"prompt": [TURN], "completion": [TURN], "messages": [TURN]},
        {"prompt": [TURN], "completion": [TURN], "tools": "[]", "id": 3},
        {"messages": [TURN]},
        {"messages": [TURN], "source": "x", "text": "a"},
        {"conversations": [FROM]},
        {"input_ids": [1, 2], "prompt": 3},
    ],
)
def test_rows_that_are_read(row):
    field = "body" if "body" in row else "text"
    assert wrong_columns(list(row), field) is None
    assert wrong_row(row, field) is None


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"instruction": "a", "output": "b"},
            "has the columns instruction, output: sft reads messages, or prompt",
        ),
        ({"text": "a", "prompt": "b"}, "has the columns text, prompt: a prompt needs a completion"),
        ({"prompt": "a", "completion": [TURN]}, "mixed form (prompt is a text, completion is messages)"),
        ({"prompt": "a", "completion": "b", "messages": [TURN]}, "completion is a text, messages is messages)"),
        ({"prompt": [{"text": "a"}], "completion": "b"}, "a row in which prompt is not a text or a list of messages"),
        ({"prompt": "a", "completion": None}, "a row in which completion is not a text or a list of messages"),
        ({"conversations": [TURN]}, "conversations is not a list of messages with from and value: [{'role':"),
        ({"messages": {"role": "user"}}, "messages is not a list of messages with role and content: {'role': 'user'}"),
        ({"text": ["a"]}, "text is not a text: ['a']"),
    ],
)
def test_rows_that_are_not_read(row, said):
    assert said in (wrong_columns(list(row), "text") or wrong_row(row, "text"))
