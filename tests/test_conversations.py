"""`dataset_conversation`: the conversations that it writes, and its messages when it cannot."""

import pytest
from datasets import Dataset

from trl_qtarget.cli.main import main
from trl_qtarget.data.conversations import check, converse


BOXED = {"user": "{problem} Answer in \\boxed{{}}.", "assistant": "{messages[0][content]}"}
ROWS = [{"problem": f"{n}+1", "messages": [{"content": f"\\boxed{{{n + 1}}}"}], "trust": 0.5} for n in range(3)]


@pytest.mark.parametrize("stream", [False, True])
def test_conversations_from_columns(stream):
    data = Dataset.from_list(ROWS)
    written = list(converse(data.to_iterable_dataset() if stream else data, {"system": "Add.", **BOXED}))
    assert written[1] == {
        "trust": 0.5,
        "prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1 Answer in \\boxed{}."}],
        "completion": [{"role": "assistant", "content": "\\boxed{2}"}],
    }


def test_a_column_that_is_not_there():
    with pytest.raises(
        ValueError, match=r"user cannot be written .*'question'.* columns are problem, messages, trust\."
    ):
        converse(Dataset.from_list(ROWS), {"user": "{question}", "assistant": "x"})


def test_a_value_that_is_not_there():
    rows = [*ROWS, {"problem": None, "messages": [{"content": "2"}], "trust": 0.5}]
    with pytest.raises(ValueError, match=r"user cannot be written from the data .a row has no value there"):
        converse(Dataset.from_list(rows), BOXED)


@pytest.mark.parametrize(
    ("conversation", "said"),
    [
        ({"user": "x"}, "must have text for user, assistant"),
        ({**BOXED, "judge": "x"}, "must have text for user, assistant"),
        ({"user": 1, "assistant": "x"}, "user must be text with columns in braces, got 1"),
        ({"user": "{problem", "assistant": "x"}, "user is no template"),
        ({"user": "\\boxed{}", "assistant": "x"}, "user has braces without a column; write other braces twice"),
    ],
)
def test_no_conversation_at_all(conversation, said):
    with pytest.raises(ValueError, match=said):
        check(conversation)


def test_the_command_refuses_in_a_sentence(capsys):
    words = ["--model_name_or_path", "m", "--dataset_name", "d", "--dataset_conversation", '{"user": "x"}']
    with pytest.raises(SystemExit) as stop:
        main(["sft", *words])
    assert stop.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "dataset_conversation must have text for user, assistant" in said
