"""The ids of a prompt in `eval` are those that the trainer has in front of a completion, whatever a tokenizer adds."""

import copy

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from trl_qtarget import TargetSFTConfig, TargetSFTTrainer
from trl_qtarget.data.prompts import common_prefix, prompt_ids
from trl_qtarget.evaluation.models import tokenize
from trl_qtarget.evaluation.problems import Problem


def adds(tokenizer, single: str):
    """The tokenizer with a post-processor that adds tokens around every text."""
    changed = copy.deepcopy(tokenizer)
    names = ("<|im_start|>", "<|im_end|>")
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[(name, changed.convert_tokens_to_ids(name)) for name in names]
    )
    return changed


AROUND = {
    "nothing": None,
    "an end": "$A <|im_end|>",
    "a beginning": "<|im_start|> $A",
    "both": "<|im_start|> $A <|im_end|>",
    "two ends": "$A <|im_end|> <|im_end|>",
}
# a template that ends the generation prompt with a block that is left out in front of an answer, as Gemma's
WITH_BLOCK = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n[think]{% endif %}"
)
WITH_TOOLS = "{% if tools %}{{ tools | length }} tools{% endif %}{% if loud %}!{% endif %}" + WITH_BLOCK


@pytest.fixture
def trained(tiny_model, tmp_path):
    """`trained(rows, tokenizer)`: the ids in front of the completion in each row that the trainer prepares."""

    def run(rows, tokenizer):
        config = TargetSFTConfig(
            output_dir=str(tmp_path), loss="nll", use_cpu=True, bf16=False, report_to="none", shuffle_dataset=False
        )
        trainer = TargetSFTTrainer(
            tiny_model(), config, train_dataset=Dataset.from_list(rows), processing_class=copy.deepcopy(tokenizer)
        )
        made = trainer.train_dataset
        learnt = [next(i for i, label in enumerate(row["labels"]) if label != -100) for row in made]
        return [row["input_ids"][:first] for row, first in zip(made, learnt, strict=True)]

    return run


@pytest.mark.parametrize("around", AROUND)
def test_ids_are_those_of_the_trainer(trained, tokenizer, rows, around):
    used = tokenizer if AROUND[around] is None else adds(tokenizer, AROUND[around])
    texts = rows(4)
    expected = trained(texts, used)
    assert [prompt_ids(used, row["prompt"], row) for row in texts] == expected
    assert [tokenize(used, "m", i, Problem(row["prompt"], "1", row)) for i, row in enumerate(texts)] == expected
    end = used.convert_tokens_to_ids("<|im_end|>")
    assert not any(end in ids for ids in expected)
    assert all((ids[0] == used.convert_tokens_to_ids("<|im_start|>")) == ("b" in around) for ids in expected)


@pytest.mark.parametrize("template", [None, WITH_BLOCK, WITH_TOOLS])
@pytest.mark.parametrize("around", ["nothing", "both"])
def test_ids_of_messages_are_those_of_the_trainer(trained, tokenizer, rows, around, template):
    used = copy.deepcopy(tokenizer) if AROUND[around] is None else adds(tokenizer, AROUND[around])
    used.chat_template = template or used.chat_template
    messages = rows(4, conversational=True)
    if template == WITH_TOOLS:
        messages = [{**row, "tools": '[{"name": "add"}]', "chat_template_kwargs": {"loud": True}} for row in messages]
    expected = trained(messages, used)
    assert [prompt_ids(used, row["prompt"], row) for row in messages] == expected
    text = used.decode(expected[0])
    assert text.endswith("<|im_start|>assistant\n")
    assert text.startswith("1 tools!") == (template == WITH_TOOLS)


def test_a_token_that_some_completions_change_stays(trained, rows):
    """Byte-level pairs join across the border of prompt and completion for some completions and not for others."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    text = ["the sum of 12 and 30 is 42\n\n", "answers: one hundred", "one\n\n\ntwo"] * 20
    raw.train_from_iterator(text, trainers.BpeTrainer(vocab_size=330, special_tokens=special))
    used = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=special[0], eos_token=special[2])
    for prompt in ("the sum", "of 12", "12 and 30 is ", "is 42\n", "answers: one hund", "(", "42."):
        assert prompt_ids(used, prompt) == used(prompt)["input_ids"]
    cut = adds(used, "$A <|im_end|>")
    assert prompt_ids(cut, "the sum of 12 and ") == used("the sum of 12 and ")["input_ids"]


def test_common_prefix():
    assert [common_prefix(*pair) for pair in (([], [1]), ([1, 2], [1, 2]), ([1, 2], [1, 3, 2]), ([1], [2]))] == [
        0, 2, 1, 0
    ]  # fmt: skip


def test_a_prompt_without_tokens_is_refused(tokenizer):
    with pytest.raises(ValueError, match="prompt of row 3 is empty in the tokens of m"):
        tokenize(adds(tokenizer, "$A <|im_end|>"), "m", 3, Problem("", "1", {}))


def test_a_template_that_refuses_a_prompt_is_a_sentence(tokenizer):
    used = copy.deepcopy(tokenizer)
    used.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match="The chat template of m refuses the prompt of row 0: System role not"):
        tokenize(used, "m", 0, Problem([{"role": "system", "content": "x"}], "1", {}))
