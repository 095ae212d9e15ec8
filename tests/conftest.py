"""What every test gets: no network, one thread, Triton's interpreter where there is no GPU, and tiny models.

Models are made from a config with random weights (about 100k parameters), so nothing is ever downloaded.
"""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import string
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before anybody does
torch.set_num_threads(1)

# Derandomized: the suite is the same on every machine, and a failure prints what reproduces it.
settings.register_profile(
    "repo",
    deadline=None,
    derandomize=True,
    print_blob=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the autouse fixtures below hold no state
)
settings.load_profile("repo")

VOCAB = 640  # rows of the students' heads; the tokenizer has fewer ids, as with real, padded vocabularies
TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Memory our own modules ask for uninitialised holds NaN, so that reading it before writing it shows."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            out = make(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("trl_qtarget.") and out.is_floating_point():
                out.detach().fill_(float("nan"))
            return out

        return wrapper

    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def precision_of_its_own():
    """A test with bf16 leaves this behind under transformers 4, and accelerate would give it to the next test."""
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


def make_tokenizer():
    """Character tokenizer over printable ASCII (about 100 ids), ChatML template with `{% generation %}` marks."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>", *string.printable[:95], "\n"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer that every model of the tests shares. Do not change it: `copy.deepcopy` it first."""
    return make_tokenizer()


def make_model(vocab_size: int = VOCAB, hidden: int = 32, layers: int = 2, tie: bool = True, seed: int = 0, **config):
    """A Qwen3 of random weights, wide enough spread that its distributions are far from uniform."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            **{
                "vocab_size": vocab_size,
                "hidden_size": hidden,
                "intermediate_size": 3 * hidden,
                "num_hidden_layers": layers,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": hidden // 2,
                "max_position_embeddings": 512,
                "initializer_range": 0.3,
                "tie_word_embeddings": tie,
                "pad_token_id": 0,
                "bos_token_id": None,
                "eos_token_id": 3,
                **config,
            }
        )
    )


@pytest.fixture(scope="session")
def tiny_model() -> Callable:
    """`tiny_model(vocab_size=640, hidden=32, layers=2, tie=True, seed=0, **config)`: a fresh fp32 model on the CPU."""
    return make_model


def save(model, tokenizer, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def student_dir(tokenizer, tmp_path_factory) -> str:
    """Folder of a saved student: 2 layers, hidden 32, 640 rows, tied head. Read only."""
    return save(make_model(seed=1), tokenizer, tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def teacher_dir(tokenizer, tmp_path_factory) -> str:
    """Folder of a saved teacher: wider than the student (hidden 48), same 640 rows, untied head. Read only."""
    return save(make_model(hidden=48, tie=False, seed=2), tokenizer, tmp_path_factory.mktemp("teacher"))


def make_rows(n: int = 8, conversational: bool = False, seed: int = 0) -> list[dict]:
    """`n` sums with answers of different lengths: `{"prompt": "7+15=", "completion": "22"}`, or as messages."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(n):
        terms = [draw.randrange(40) for _ in range(draw.randint(2, 4))]
        pairs.append(("+".join(map(str, terms)) + "=", str(sum(terms)) + "!" * draw.randrange(4)))
    if not conversational:
        return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    return [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
        }
        for prompt, completion in pairs
    ]


@pytest.fixture(scope="session")
def rows() -> Callable[..., list[dict]]:
    """`rows(n=8, conversational=False, seed=0)`: prompt-completion rows for `datasets.Dataset.from_list`."""
    return make_rows
