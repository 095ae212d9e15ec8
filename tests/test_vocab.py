"""Tokenizers that differ in one thing each, and what training makes of it."""

import copy
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_qtarget import TargetSFTConfig, TargetSFTTrainer
from trl_qtarget.data.known_ids import KnownIds
from trl_qtarget.teachers.vocab import PROBES, Agreement, common_columns, compare, texts_of
from trl_qtarget.training.checks import compare_tokenizers


SPECIALS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("d", "e"), ("e", "f"), ("q", "z"), ("z", "x"), ("1", "2")]
COMMON = len(SPECIALS) + 256 + len(MERGES)
TOOL = {"prompt": "2+2=", "completion": "<tool>"}


def bpe(merges=MERGES, specials=SPECIALS, added=(), normalizer=None, before=()):
    """A byte-level BPE of a few merges; whatever their order, ids are the same."""
    words = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *sorted(a + b for a, b in merges)]
    raw = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    if normalizer is not None:
        raw.normalizer = normalizer
    raw.pre_tokenizer = pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=specials[0],
        eos_token=specials[2],
        additional_special_tokens=[specials[1]],
        model_max_length=512,
    )
    tokenizer.add_tokens(list(added))
    return tokenizer


# Two tokenizers


def test_the_same_tokenizer_agrees_on_all_of_its_ids():
    assert compare(bpe(), bpe()) == Agreement(COMMON, {}, {})


@pytest.mark.parametrize(
    "other",
    [
        {"merges": [MERGES[1], MERGES[0], *MERGES[2:]]},
        {"merges": MERGES, "normalizer": normalizers.Lowercase()},
        {"merges": MERGES, "normalizer": normalizers.NFC()},
        {"merges": MERGES, "normalizer": normalizers.NFKC()},
        {"merges": MERGES, "normalizer": normalizers.Strip()},
        {"merges": MERGES, "before": [pre_tokenizers.Digits(individual_digits=True)]},
    ],
    ids=["merges", "lowercase", "nfc", "nfkc", "strip", "digits"],
)
def test_equal_ids_with_another_way_to_split_text_are_refused(other):
    with pytest.raises(ValueError, match="has the student's token ids but splits text differently"):
        compare(bpe(), bpe(**other))


def test_the_first_token_that_is_split_differently_is_shown():
    other = bpe(merges=[MERGES[1], MERGES[0], *MERGES[2:]])
    with pytest.raises(ValueError, match=r"'a def' has, from token 2 on, \['de', 'f'\] .* and \['d', 'ef'\]"):
        compare(bpe(), other, ["a def"])


def test_merges_beyond_the_common_ids_are_another_way_to_split_text():
    longer = bpe(merges=[*MERGES, ("{", "'")])
    with pytest.raises(ValueError, match=r"on, \['{', \"'\", .* and \[\"{'\""):
        compare(bpe(), longer)
    assert compare(bpe(), longer, []).teacher_only == {COMMON: "{'"}


def test_a_merge_that_no_probe_shows_is_seen_in_the_data(tmp_path):
    other = bpe(merges=[*MERGES[:2], MERGES[3], MERGES[2], MERGES[4]])
    assert compare(bpe(), other).common == COMMON
    other.save_pretrained(tmp_path)
    rows = [{"messages": [{"role": "user", "content": "qzx"}]}]
    with pytest.raises(ValueError, match="'qzx' has, from token 0 on"):
        compare_tokenizers("", str(tmp_path), bpe(), TargetSFTConfig(bf16=False), rows)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_tokens_added_to_one_side_are_listed(side, tmp_path):
    longer, shorter = bpe(added=["<tool>", "<end>"]), bpe()
    student, teacher = (longer, shorter) if side == "student" else (shorter, longer)
    own = {COMMON: "<tool>", COMMON + 1: "<end>"}
    expected = Agreement(COMMON, own, {}) if side == "student" else Agreement(COMMON, {}, own)
    assert compare(student, teacher, [*PROBES, "call <tool> now"]) == expected
    teacher.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=rf"'<tool>' \({COMMON}\), '<end>' \({COMMON + 1}\) for the {side} only"):
        assert compare_tokenizers("", str(tmp_path), student, TargetSFTConfig(bf16=False)) == expected


def test_both_sides_may_have_added_tokens_and_a_long_list_is_cut():
    both = compare(bpe(added=["<tool>"]), bpe(added=[f"<{i}>" for i in range(30)]))
    assert (both.common, len(both.student_only), len(both.teacher_only)) == (COMMON, 1, 30)
    assert both.one_sided().endswith("'<19>' (283) and 10 more for the teacher only")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            bpe(specials=["<|pad|>", "<|im_start|>", "<|eot|>"]),
            r"2 differ: '<\|eot\|>' is unknown for the student and 2 for the teacher; '<\|im_end\|>' is 2 for the",
        ),
        (
            bpe(specials=["<|im_start|>", "<|pad|>", "<|im_end|>"]),
            r"'<\|im_start\|>' is 1 for the student and 0 for the teacher",
        ),
        (bpe(merges=[*MERGES[:4], ("1", "3")]), "2 differ: '12' is 259"),
        (bpe(specials=[*SPECIALS, "<new>"]), "is 3 for the student and 4 for the teacher"),
    ],
    ids=["a special", "two specials", "a merge", "all after one"],
)
def test_another_token_map_is_refused_by_its_first_tokens(other, message):
    with pytest.raises(ValueError, match=message):
        compare(bpe(), other)


def test_tokenizers_without_a_common_token_are_refused():
    one, two = (
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({word: 0}, unk_token=word)))
        for word in ("a", "b")
    )
    with pytest.raises(ValueError, match="2 differ: 'a' is 0 for the student and unknown for the teacher"):
        compare(one, two)


def test_text_is_found_wherever_it_stands_in_a_row(tokenizer):
    row = {"messages": [{"role": "user", "content": "a"}], "n": 3, "text": "b" * 2000, "none": None}
    assert texts_of(row, tokenizer) == ["user", "a", "b" * 1000]
    assert texts_of({"input_ids": tokenizer.encode("1+1=2")}, tokenizer) == ["1+1=2"]


# Heads


@pytest.mark.parametrize(
    ("agreement", "tokens", "rows", "columns", "report"),
    [
        (
            Agreement(151_665),
            151_665,
            (151_936, 152_064),
            151_665,
            "identical on 151,665 ids; ignoring 271 (student) and 399 (teacher) padded rows",
        ),
        (Agreement(100), 100, (640, 640), None, "identical on 100 ids; comparing all 640 rows"),
        (
            Agreement(100, teacher_only={100: "<x>"}),
            100,
            (640, 640),
            100,
            "identical on 100 ids; ignoring 540 (student) and 540 (teacher) padded or unshared rows",
        ),
        # a chat template of another model has added a token since
        (
            Agreement(100),
            101,
            (101, 100),
            100,
            "identical on 100 ids; ignoring 1 (student) and 0 (teacher) padded or unshared rows",
        ),
        (None, 100, (640, 704), 100, "ids not checked; ignoring 540 (student) and 604 (teacher) padded rows"),
        (None, 100, (640, 640), None, "ids not checked; comparing all 640 rows"),
    ],
)
def test_the_columns_compared_and_what_is_said_of_them(agreement, tokens, rows, columns, report):
    assert common_columns(agreement, tokens, *rows) == (columns, f"Student and teacher: {report}")


# Labels


def test_a_batch_with_an_unknown_label_is_refused(tokenizer):
    batch = {"input_ids": torch.tensor([[9, 5, 6], [9, 8, 99]]), "labels": torch.tensor([[99, -100, 6], [9, 8, 99]])}
    with pytest.raises(ValueError, match=r"Row 1 of a batch has '\\n' \(id 99\) in labels at position 2, after"):
        KnownIds(lambda _: batch, {"labels": 99}, tokenizer)([])
    batch["labels"][1, 2] = -100  # then only the first token is unknown, which nothing predicts
    assert KnownIds(lambda _: batch, {"labels": 99}, tokenizer)([]) is batch
    with pytest.raises(ValueError, match="choose a pad_token that both know"):
        KnownIds(lambda _: batch, {"labels": 99, "input_ids": 99}, tokenizer)([])


def test_a_dataset_is_scanned_as_packing_has_left_it(tokenizer):
    known = KnownIds(None, {"labels": 50}, tokenizer)
    rows = [{"labels": [1, 2]}] * 1500 + [{"labels": []}, {"labels": [60, 1, 60]}]
    with pytest.raises(ValueError, match=r"Row 1501 of the prepared eval \(a\) dataset has .* at position 2"):
        known.scan("eval", {"a": Dataset.from_list(rows)})
    with pytest.raises(ValueError, match=r"Row 1 of the prepared train dataset has .* at position 2"):
        known.scan("train", Dataset.from_list(rows).select([3, 1501, 4]))
    packed = [{"labels": [60, 1, 60, 2], "seq_lengths": [2, 2]}, {"labels": [60, 1], "seq_lengths": [2]}]
    known.scan("train", Dataset.from_list(packed))
    known.scan("train", Dataset.from_list([{"text": "a"}]))


def test_the_wrapped_collator_is_found_and_travels_to_workers(tokenizer):
    known = KnownIds(np.array([1, 2]), {"labels": 50}, tokenizer)
    assert known.shape == (2,)
    assert pickle.loads(pickle.dumps(known)).limits == {"labels": 50}


# Training


@pytest.fixture
def run(tiny_model, rows, tmp_path):
    """`run(student, teacher)` makes a trainer for these tokenizers, the teacher's saved beside a model of its own."""

    def make(student, teacher, data=None, teacher_rows=640, **options):
        folder = str(tmp_path / "teacher")
        tiny_model(vocab_size=teacher_rows, hidden=48, tie=False, seed=2).save_pretrained(folder)
        if teacher is not None:
            teacher.save_pretrained(folder)
        args = TargetSFTConfig(
            output_dir=str(tmp_path / "out"), teacher_model_name_or_path=folder, loss="target_sft", use_cpu=True,
            bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True, save_strategy="no",
            logging_steps=1, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, **options,
        )  # fmt: skip
        data = Dataset.from_list(rows(8)) if data is None else data
        return TargetSFTTrainer(tiny_model(seed=1), args, train_dataset=data, processing_class=student)

    return make


def losses(trainer):
    trainer.train()
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]


def test_the_start_of_training_says_what_is_compared(run, tokenizer, capsys):
    run(tokenizer, tokenizer, teacher_rows=704)
    line = "identical on 100 ids; ignoring 540 (student) and 604 (teacher) padded rows"
    assert capsys.readouterr().out.count(line) == 1


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_token_of_one_side_is_compared_as_padding_is(run, tokenizer, side):
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(["<tool>"])
    expected = losses(run(tokenizer, tokenizer, teacher_rows=704))  # compared over the real ids
    pair = (longer, tokenizer) if side == "student" else (tokenizer, longer)
    with pytest.warns(UserWarning, match=rf"'<tool>' \(100\) for the {side} only"):
        trainer = run(*pair, teacher_rows=704)
    assert trainer._columns == 100
    assert losses(trainer) == expected


@pytest.fixture
def with_tool(tokenizer):
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(["<tool>"])
    return longer


@pytest.mark.filterwarnings("ignore:Tokens of one side")
def test_a_label_the_teacher_does_not_know_stops_before_training(run, rows, tokenizer, with_tool):
    data = Dataset.from_list([*rows(5), TOOL])
    found = r"Row 5 of the prepared train dataset has '<tool>' \(id 100\) in labels at position 4, after '2\+2='"
    with pytest.raises(ValueError, match=found):
        run(with_tool, tokenizer, data)


@pytest.mark.filterwarnings("ignore:Tokens of one side")
@pytest.mark.parametrize(
    "options", [{}, {"dataset_kwargs": {"skip_prepare_dataset": True}}], ids=["prepared", "as is"]
)
def test_a_streamed_label_the_teacher_does_not_know_stops_its_batch(run, rows, tokenizer, with_tool, options):
    def stream():
        for row in [*rows(3), TOOL]:
            yield {"input_ids": with_tool.encode(row["prompt"] + row["completion"])} if options else row

    trainer = run(with_tool, tokenizer, IterableDataset.from_generator(stream), shuffle_dataset=False, **options)
    with pytest.raises(ValueError, match=r"Row 3 of a batch has '<tool>' \(id 100\) in labels at position 4"):
        trainer.train()


@pytest.mark.filterwarnings("ignore:Tokens of one side")
def test_a_prompt_may_hold_it_if_the_teacher_can_read_it(run, tokenizer, with_tool):
    data = Dataset.from_list([{"prompt": "<tool>4=", "completion": "4"}] * 4)
    assert losses(run(with_tool, tokenizer, data))
    with pytest.raises(ValueError, match=r"'<tool>' \(id 100\) in input_ids at position 0.* first 100 ids only"):
        run(with_tool, tokenizer, data, teacher_rows=100)


@pytest.mark.filterwarnings("ignore:Tokens of one side")
def test_padding_that_the_teacher_cannot_read_is_refused(run, tokenizer):
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "<own pad>"})
    assert losses(run(padded, tokenizer))
    trainer = run(padded, tokenizer, teacher_rows=100)
    with pytest.raises(ValueError, match=r"'<own pad>' \(id 100\) in input_ids"):
        trainer.train()


def test_a_teacher_without_a_tokenizer_is_taken_at_its_word(run, tokenizer):
    with pytest.warns(UserWarning, match="its ids are not checked"):
        trainer = run(tokenizer, None)
    assert trainer._agreement is None
    assert trainer._columns is None
