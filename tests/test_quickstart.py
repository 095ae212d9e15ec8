"""The quickstart: its task, and the models that are shipped with it."""

import hashlib
import random
import sys
from pathlib import Path

import pytest
import yaml


FOLDER = Path(__file__).parents[1] / "recipes" / "quickstart"
sys.path.insert(0, str(FOLDER))

import task  # noqa: E402


PROBLEM, DEMONSTRATION = "4-9-3*0*3-9=", "m5m2t0t0m1#1"


def test_the_shipped_files_are_those_of_the_checksums():
    lines = (FOLDER / "checksums.txt").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    shipped = {f"{model}/{file.name}" for model in ("student", "teacher") for file in (FOLDER / model).iterdir()}
    assert set(sums) == shipped
    for name, digest in sums.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest, name


@pytest.mark.parametrize(("name", "parameters"), [("student", 161_472), ("teacher", 445_152)])
def test_the_shipped_models_load_and_their_tokenizer_round_trips(name, parameters):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(FOLDER / name, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / name)
    assert model.num_parameters() == parameters
    assert len(tokenizer) == model.config.vocab_size == len(task.ALPHABET)
    text = PROBLEM + DEMONSTRATION + task.EOS
    ids = tokenizer(text)["input_ids"]
    assert ids == [task.ALPHABET.index(character) for character in text]
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == (task.EOS, task.PAD)
    assert model.config.eos_token_id == tokenizer.eos_token_id == ids[-1]


def test_a_demonstration_shows_the_true_running_results():
    assert task.running_results(PROBLEM) == [5, 2, 0, 0, 1]
    assert task.demonstration(PROBLEM, random.Random(0)) == DEMONSTRATION
    assert task.write_solution(PROBLEM, [5, 2, 0, 0, 1], 1, demonstration=False) == "-5-2*0*0-1#1"


@pytest.mark.parametrize(
    ("completion", "ended", "right"),
    [
        (DEMONSTRATION, True, True),
        ("#1", True, True),  # no work is asked for
        ("m5m2t0t0m1#2", True, False),
        (DEMONSTRATION, False, False),  # cut off: more digits might have followed
        ("m5m2t0t0m1#11", True, False),
        ("m5m2t0t0m1#1#1", True, False),  # the first # counts
        ("m5m2t0t0m1", True, False),
        ("m5m2t0t0m1#", True, False),
        ("", True, False),
    ],
)
def test_the_verifier_wants_the_digit_and_the_end(completion, ended, right):
    assert task.correct(completion, "1", {}, ended) is right


def test_the_package_finds_the_verifier_and_tells_it_what_ended():
    from trl_qtarget.evaluation.verifiers import find_verifier

    verify = find_verifier(f"{FOLDER / 'task.py'}:correct")
    assert verify(DEMONSTRATION, "1", {"_ended": True}) == 1
    assert verify(DEMONSTRATION, "1", {"_ended": False}) == 0


def test_the_reward_is_the_verifier():
    ids = [task.ALPHABET.index(c) for c in DEMONSTRATION]
    ended = [*ids, task.ALPHABET.index(task.EOS)]
    told = {"completions": [DEMONSTRATION] * 3, "completion_ids": [ended, ids, ended], "answer": ["1", "1", "2"]}
    assert task.reward(prompts=[PROBLEM] * 3, **told) == [1.0, 0.0, 0.0]


def test_practice_is_of_the_training_problems_and_has_nothing_to_imitate():
    rows = task.practice_rows(200, seed=1)
    assert all(set(row) == {"prompt", "answer"} and task.split_of(row["prompt"]) == "train" for row in rows)
    assert all(row["answer"] == task.answer_of(row["prompt"]) for row in rows)
    assert rows != task.practice_rows(200, seed=2)


def test_data_depend_on_the_seed_alone():
    assert task.training_rows(50, 0.2, seed=3) == task.training_rows(50, 0.2, seed=3)
    assert task.training_rows(50, 0.2, seed=3) != task.training_rows(50, 0.2, seed=4)
    assert task.held_out_rows(50, "test") == task.held_out_rows(50, "test")
    assert task.training_rows(1, 0.0, seed=0) == [  # and on nothing that differs between machines
        {"prompt": "9-3*8-2-4-2=", "completion": "m6t8m6m2m0#0", "answer": "0"}
    ]


def test_the_splits_are_disjoint():
    train = {row["prompt"] for seed in range(3) for row in task.training_rows(2000, 0.2, seed)}
    held_out = {split: {row["prompt"] for row in task.held_out_rows(500, split)} for split in task.HELD_OUT}
    assert not train & held_out["test"]
    assert not train & held_out["validation"]
    assert not held_out["test"] & held_out["validation"]


def test_a_fifth_of_the_demonstrations_is_wrong_half_in_a_step_and_half_in_the_answer():
    rows = task.training_rows(5000, 0.2, seed=0)
    wrong = [row for row in rows if row["completion"] != task.demonstration(row["prompt"], random.Random(0))]
    assert len(wrong) == 1000
    answer_only = [row for row in wrong if row["completion"][-1] != row["completion"][-3]]
    assert 0.45 < len(answer_only) / len(wrong) < 0.55
    for row in answer_only:
        results = [int(digit) for digit in row["completion"][1:10:2]]
        assert results == task.running_results(row["prompt"])
        assert row["completion"][-1] != row["answer"]


def test_the_recipes_differ_in_the_loss_its_teacher_and_the_learning_rate_only():
    recipes = [yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in ("nll", "dft", "target_sft")]
    assert [recipe["loss"] for recipe in recipes] == ["nll", "dft", "target_sft"]
    for recipe in recipes:
        for key in ("loss", "loss_kwargs", "teacher_model_name_or_path", "learning_rate", "output_dir"):
            recipe.pop(key, None)
    assert recipes[0] == recipes[1] == recipes[2]
