"""Mistakes, and the one sentence that answers each: what is typed -> what is said, with which exit code.

Every row is a command as a user would type it. It must end with the exit code, print exactly one line that begins with
the program's name (or the stated number of lines), show no traceback, and leave every file as it was. Commands run in
this process: what `accelerate launch` would start runs in its place.
"""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import make_model, make_rows, save

import trl_qtarget
from trl_qtarget import TargetSFTConfig, build
from trl_qtarget.cli.main import main
from trl_qtarget.options import launching, preflight


ROOT = Path(trl_qtarget.__file__).parents[1]


@dataclass(frozen=True)
class Mistake:
    """A command line, and how it must end.

    `settings` go into a YAML file for `--config`, `hidden` are packages that look as if they were not installed, and
    `launched` rows go through accelerate's launcher itself.
    """

    command: str
    words: str  # behind the command
    said: str  # pattern of the line after the program's name, from its beginning
    code: int = 2
    lines: int = 1
    settings: dict | str | None = None
    hidden: tuple[str, ...] = ()
    launched: bool = False

    @property
    def typed(self) -> str:
        return f"{self.command} {self.words}"

    def __str__(self) -> str:
        return " ".join([*self.command.split()[:1], self.words, *([str(self.settings)] if self.settings else [])])


SFT = (
    "sft --model_name_or_path student --loss dft --dataset_name good --output_dir out --max_steps 1 --use_cpu true "
    "--bf16 false --report_to none --save_strategy no --disable_tqdm true --per_device_train_batch_size 2"
)
NO_DATA = SFT.replace("--dataset_name good ", "")
CACHE = f"cache {SFT[4:]} --loss target_sft --teacher_model_name_or_path teacher --teacher_cache kept"
PLAN = f"plan {SFT[4:]}"
EVAL = "eval --model_name_or_path student --dataset problems.jsonl --k 2 --max_new_tokens 4"
UNREACHABLE = "no model of that name in the local cache of the Hub, and the Hub cannot be reached"
COLUMNS = "sft reads messages, or prompt and completion, or conversations, or input_ids, or text"


def of(command: str, *rows: tuple) -> list[Mistake]:
    """Rows (words, pattern, code) or (words, pattern, code, other fields) that continue a command."""
    made = []
    for words, said, *more in rows:
        fields = more.pop() if more and isinstance(more[-1], dict) else {}
        made.append(replace(Mistake(command, words, said, *more), **fields))
    return made


DATA = of(
    SFT,
    (
        "--dataset_name long --max_length 32",
        "None of the 6 rows of the train dataset has a label left after max_length=32",
    ),
    (
        "--dataset_name alpaca",
        f"the data alpaca, split 'train', has the columns instruction, input, output: {COLUMNS}",
    ),
    ("--dataset_name alpaca --dataset_streaming true", f"the data alpaca, .* instruction, input, output: {COLUMNS}"),
    (
        "--dataset_name response",
        "the data response, .* has the columns prompt, text, response: a prompt needs a completion",
    ),
    (
        "--dataset_name mixed",
        "the data mixed.* (4 of 8 rows without a value for prompt, and it has the|rows have no) column .?messages",
    ),
    ("--dataset_name two_files", "the data two_files cannot be read: its files differ in their columns"),
    (
        "--dataset_name two_forms",
        "the data two_forms, .* has rows of mixed form \\(prompt is a text, completion is messages",
    ),
    ("--dataset_name both", "the data both, .* has rows of mixed form \\(.*messages is messages\\): name the columns"),
    (
        "--dataset_name numbers",
        "the data numbers, .* has a row in which prompt is not a text or a list of messages .*: 1$",
    ),
    ("--dataset_name texts", "the data texts, .* has a row in which messages is not a list of messages with role"),
    (
        "--dataset_name turns",
        "the data turns, .* has a row in which conversations is not a list of messages with from",
    ),
    ("--dataset_name gap", "the data gap, .* has 1 of 4 rows without a value for completion$"),
    ("--dataset_name empty_turns", "the data empty_turns, .* has 1 of 2 rows without a value for messages$"),
    ("--dataset_name mute", "the data mute, .* has 1 messages in messages that have a role and nothing else"),
    (
        "--dataset_name ids_text",
        "the data ids_text, .* has a row in which input_ids is not a list of whole numbers: 'a'$",
    ),
    ("--dataset_name ids_float", "the data ids_float, .* has a row in which input_ids is not a list of whole numbers"),
    ("--dataset_name ids_below", "the data ids_below, .* has a row with a token id below 0: \\[1, -2\\]$"),
    (
        "--dataset_name labels_one",
        "the data labels_one, .* has a row in which labels is not a list of whole numbers: 1$",
    ),
    ("--dataset_name labels_short", "the data labels_short, .* has a row with 3 input_ids and 2 labels$"),
    ("--dataset_name tools", "not JSON \\(.*\\): '{bad'$"),
    ("--dataset_name json", "the data json cannot be read: .*json is a reader, and nothing says which files"),
    ("--dataset_config nope", "the data good cannot be read: BuilderConfig 'nope' not found"),
    ("--dataset_name torn.parquet", "the data torn.parquet cannot be read: .*[Pp]arquet"),
    ("--dataset_name void", "the data void cannot be read: the folder holds no file that ends in .json, .jsonl"),
    ("--dataset_name notes", "the data notes cannot be read: the folder holds no file that ends in .json, .jsonl"),
    ("--dataset_name zero", "the data zero cannot be read: it has no rows$"),
    ("--dataset_name zero/train.jsonl", "the data zero/train.jsonl cannot be read: it has no rows$"),
    ("--dataset_name saved_empty", "the data saved_empty.* (it has no rows|has no rows\\.)$"),
    ("--dataset_name torn", "the data torn cannot be read: (JSON parse error|No ':')"),
    ("--dataset_name ./nowhere", "dataset_name: there is no file or folder ./nowhere$"),
    ("--dataset_name ./goood", "dataset_name: there is no file or folder ./goood \\(did you mean 'good'\\?\\)$"),
    (
        "--dataset_name nowhere",
        "the data nowhere cannot be read: there is no file or folder of that name here, and Couldn",
    ),
    ("--dataset_train_split tran", "The data has no split 'tran', it has 'train': pass --dataset_train_split"),
    ("--eval_strategy steps", "The data has no split 'test', it has 'train': pass --dataset_test_split"),
    (
        "",
        "dataset_conversation: user cannot be written from the data \\('x'\\); the columns are prompt, completion",
        {"settings": {"dataset_conversation": {"user": "{x}", "assistant": "{completion}"}}},
    ),
    (
        "",
        "dataset_conversation must have text for user, assistant",
        {"settings": {"dataset_conversation": {"user": "x"}}},
    ),
    ("--dataset_conversation {bad", "dataset_conversation must be JSON such as"),
    ("--assistant_only_loss true", "You set `assistant_only_loss=True`, but the dataset is not conversational"),
    ("--padding_free true", "When `padding_free=True` without packing, `max_length` is not enforced"),
) + of(
    NO_DATA,
    ("", "no data: pass --dataset_name, or list `datasets` in the YAML file$"),
    (
        "",
        "the data good, two_files/a.jsonl, .* has 4 of 12 rows without a value for prompt",
        {"settings": {"datasets": [{"path": "good"}, {"path": "two_files/a.jsonl"}]}},
    ),
    (
        "",
        "the data good, nowhere cannot be read: ",
        {"settings": {"datasets": [{"path": "good"}, {"path": "nowhere"}]}},
    ),
    (
        "",
        "the data good cannot be read: Column name .*nope",
        {"settings": {"datasets": [{"path": "good", "columns": ["nope"]}]}},
    ),
)

MODELS = of(
    SFT,
    (
        "--model_name_or_path studnt",
        "model_name_or_path: there is no folder studnt here \\(did you mean 'student'\\?\\), and no",
    ),
    ("--model_name_or_path some/model", f"model_name_or_path: there is no folder some/model here, and {UNREACHABLE}"),
    ("--model_name_or_path ./no", "model_name_or_path: there is no folder ./no$"),
    ("--model_name_or_path good", "model_name_or_path: the folder good holds no model \\(no config.json\\)$"),
    (
        "--model_name_or_path cut",
        "model_name_or_path: cut/model.safetensors is cut off: 3000 of \\d+ bytes are there$",
    ),
    ("--model_name_or_path no_shard", "model_name_or_path: no_shard/model-00002-of-00002.safetensors is missing$"),
    ("--model_name_or_path no_weights", ".*no file named .*model.safetensors.*no_weights"),
    ("--model_name_or_path bad_config", ".*'bad_config/config.json' is not a valid JSON file"),
    (
        "--model_name_or_path no_tokenizer",
        "model_name_or_path: the folder no_tokenizer holds no tokenizer: save the tokenizer",
    ),
    ("--loss target_sft", "loss 'target_sft' needs a teacher: pass --teacher_model_name_or_path, or --teacher_cache$"),
    (
        "--loss target_sft --teacher_model_name_or_path teachr",
        f"teacher_model_name_or_path: there is no folder teachr here .*{UNREACHABLE}",
    ),
    ("--loss target_sft --teacher_model_name_or_path ./no", "teacher_model_name_or_path: there is no folder ./no$"),
    (
        "--loss target_sft --teacher_model_name_or_path cut",
        "teacher_model_name_or_path: cut/model.safetensors is cut off: 3000",
    ),
    ("--loss target_sft --teacher_cache good", "teacher_cache: the folder good holds no cache \\(no manifest.json\\)"),
    (
        "--loss target_sft --teacher_cache ./no",
        "teacher_cache: there is no folder ./no; make the cache with trl-qtarget cache$",
    ),
    ("--loss target_sft --teacher_cache nocache", "nocache is no folder, and no dataset that the Hub gives"),
    ("--chat_template_path jinjaml", f"chat_template_path: there is no folder jinjaml here, and {UNREACHABLE}"),
    ("--chat_template_path ./no.jinja", "chat_template_path: there is no file or folder ./no.jinja$"),
    (
        "--dataset_name chat --chat_template_path refuses.jinja",
        "the chat template cannot write the data: TemplateError: roles must alternate$",
    ),
    (
        "--dataset_name chat --chat_template_path broken.jinja",
        "the chat template cannot write the data: TemplateSyntaxError: ",
    ),
    ("--eos_token <nope>", "The specified `eos_token` \\('<nope>'\\) is not found in the vocabulary"),
    ("--trust_token_ids <nope>", "trust_token_ids: '<nope>' is no token of this tokenizer"),
    ("--model_init_kwargs '{\"nonsense\": 1}'", ".*got an unexpected keyword argument 'nonsense'$"),
    ("--use_peft true --lora_target_modules nope", "Target modules nope not found in the base model"),
    ("--use_peft true", "use_peft: the package peft is not installed: pip install peft$", {"hidden": ("peft",)}),
)

LOSSES = of(
    SFT,
    ("--loss dtf", "Unknown loss 'dtf'. Did you mean 'dft'\\?"),
    ("--loss ''", "Unknown loss ''. Known losses: asft"),
    ("--loss_type dft", "loss_type='dft' is TRL's own option and is not read here: pass --loss dft"),
    ("--loss_kwargs '{\"eta\": 1}'", "Loss 'dft' takes .*, not eta"),
    ("--loss_kwargs 3", "loss_kwargs must be a mapping, got 3"),
    ("--loss label_smoothing --loss_kwargs '{\"lam\": 2}'", "Loss 'label_smoothing' needs 0 <= lam <= 1, got 2"),
    ("--loss nowhere:loss", "Unknown loss 'nowhere:loss': there is no module 'nowhere' here or on the Python path"),
    ("--loss nowhere.py:loss", "Unknown loss 'nowhere.py:loss': there is no file nowhere.py"),
    (
        "--loss raises.py:loss",
        "Loss 'raises.py:loss': importing raises.py failed with ZeroDivisionError: .* \\(line 3 of .*raises.py\\)$",
    ),
    (
        "--loss raises:loss",
        "Loss 'raises:loss': importing raises failed with ZeroDivisionError: .* \\(line 3 of .*raises.py\\)$",
    ),
    (
        "--loss syntax.py:loss",
        "Loss 'syntax.py:loss': importing syntax.py failed with SyntaxError: .* \\(line 1 of .*syntax.py\\)$",
    ),
    (
        "--loss exits.py:loss",
        "Loss 'exits.py:loss': importing exits.py failed with SystemExit: 3 \\(line 2 of .*exits.py\\)$",
    ),
    ("--loss mine.py:none", "Loss 'mine.py:none' must return a Target, it returned NoneType"),
    ("--loss mine.py:fails", "Loss 'mine.py:fails' raised KeyError: 'a' \\(line 5 of .*mine.py\\)$"),
    ("--loss mine.py:needs", "Loss 'mine.py:needs' needs a value for rate: pass it in loss_kwargs"),
    (
        '--loss mine.py:needs --loss_kwargs \'{"rate": "fast"}\'',
        "Loss 'mine.py:needs' needs a number for rate, got 'fast'",
    ),
    ("--loss mine.py:nope", "mine.py has no loss 'nope'"),
    ("--loss os:getcwd", "os:getcwd has no decorator @preset and no return annotation"),
)

NUMBERS = of(
    SFT,
    ("--max_length -5", "max_length must be at least 1, got -5$"),
    ("--max_length 0", "max_length must be at least 1, got 0$"),
    ("--max_steps 0", "max_steps must be at least 1, or -1 to train for num_train_epochs, got 0$"),
    ("--max_steps -1 --num_train_epochs 0", "num_train_epochs must be above 0, got 0.0$"),
    ("--max_steps 2.5", "argument --max_steps/--max-steps: invalid int value: '2.5'$"),
    ("--learning_rate -1", "learning_rate must be at least 0, got -1.0$"),
    ("--per_device_train_batch_size 0", "per_device_train_batch_size must be at least 1, got 0$"),
    ("--gradient_accumulation_steps 0", "gradient_accumulation_steps must be at least 1, got 0$"),
    ("--dataloader_num_workers -1", "dataloader_num_workers must be at least 0, got -1$"),
    ("--trust_floor 2", "trust_floor must be between 0 and 1, got 2.0"),
    ("--teacher_ema_decay 1", "teacher_ema_decay must lie between 0 and 1, got 1.0"),
    ("--qtarget_chunk_size 0", "qtarget_chunk_size must be at least 1 token, got 0"),
    ("--max_length 0 --max_steps 0", "max_length must be at least 1, got 0$", 2, 2),
)

MACHINE = [
    *of(
        SFT,
        (
            "--report_to wandb",
            "report_to: the package wandb is not installed: install it, or log nowhere",
            {"hidden": ("wandb",)},
        ),
        (
            "--report_to tensorboard",
            "report_to: the package tensorboard is not installed",
            {"hidden": ("tensorboard", "tensorboardX")},
        ),
        ("--report_to wandbb", "wandbb is not supported, only .* are supported"),
        (
            "--qtarget_backend triton",
            "qtarget_backend: backend='triton' cannot run here: .* Leave it at 'auto', or choose 'torch'",
        ),
        ("--qtarget_backend cuda", "qtarget_backend must be one of auto, triton, torch, got 'cuda'"),
        ("--optim galore_adamw", "You need to install `galore_torch`"),
        ("--attn_implementation nope", 'Specified `attn_implementation="nope"` is not supported'),
        (
            "--output_dir good/train.jsonl",
            "output_dir good/train.jsonl cannot be written: good/train.jsonl is a file$",
        ),
        (
            "--output_dir good/train.jsonl/x",
            "output_dir good/train.jsonl/x cannot be written: .*train.jsonl is a file$",
        ),
        ("--output_dir finished", "output_dir finished holds a finished model: give another --output_dir, or replace"),
        ("--output_dir unfinished", "output_dir unfinished holds checkpoints, and no qtarget_run.json that says"),
        (
            "--output_dir others",
            'output_dir others holds checkpoints of a run with other settings \\(loss was "nll" and is "dft"\\)',
        ),
        (
            "--output_dir others --resume_from_checkpoint true",
            "output_dir others holds checkpoints of a run with other settings",
        ),
        (
            "--output_dir good --resume_from_checkpoint true",
            "resume_from_checkpoint: output_dir good holds no checkpoint",
        ),
        (
            "--resume_from_checkpoint nope",
            "resume_from_checkpoint: nope is no checkpoint \\(no trainer_state.json\\)$",
        ),
        (
            "--accelerate_config zero9",
            "argument --accelerate_config/--accelerate-config: 'zero9' is neither a file nor one of fsdp1",
        ),
        ("--num_processes two", "argument --num_processes/--num-processes: invalid int value: 'two'$"),
        ("--lr_scheduler_kwargs {bad", "lr_scheduler_kwargs is not JSON \\(.*\\): '{bad'$"),
        ("--accelerator_config no.json", ".*No such file or directory: 'no.json'$"),
        ("--accelerate_config list.yaml", "accelerate launch: ", {"launched": True}),
        ("--accelerate_config torn.yaml", "accelerate launch: ", {"launched": True}),
        ("--cpu --multi_gpu", "You can only use one of `--cpu`, `--multi_gpu`", {"launched": True}),
        (
            "--config_file nowhere.yaml",
            "The passed configuration file `nowhere.yaml` does not exist",
            {"launched": True},
        ),
    ),
    *of(
        SFT,
        ("--losss dft", "unknown option '--losss' \\(did you mean '--loss'\\?\\)$"),
        ("--torch_dtype bfloat16", "unknown option '--torch_dtype' \\(did you mean '--dtype'\\?\\)$"),
        ("extra", "unexpected argument 'extra': every setting is given by name, see --help$"),
        ("--config nowhere.yaml", "cannot read --config nowhere.yaml: No such file or directory$"),
        ("--config torn.yaml", "torn.yaml is not plain YAML: "),
        ("--config list.yaml", "list.yaml must hold settings as `name: value` lines$"),
        ("", "recipe.yaml: unknown key 'los' \\(did you mean 'loss'\\?\\)$", {"settings": {"los": "dft"}}),
        ("", "recipe.yaml: max_steps must be a whole number, got 2.5$", {"settings": {"max_steps": 2.5}}),
        ("", "recipe.yaml: unknown key", 2, 3, {"settings": {"los": 1, "packing": "maybe", "max_steps": "x"}}),
        ("", "recipe.yaml sets loss twice$", {"settings": "loss: dft\nloss: nll\n"}),
        (
            "",
            "recipe.yaml is not plain YAML: could not determine a constructor",
            {"settings": "loss: !!python/name:os.getcwd\n"},
        ),
    ),
]
if find_spec("deepspeed") is None:
    MACHINE += of(SFT, ("--accelerate_config zero2", "DeepSpeed is not installed", {"launched": True}))

COMMANDS = [
    *of(
        CACHE,
        (
            "--dataset_name long --max_length 32",
            "None of the 6 rows of the train dataset has a label left after max_length=32",
        ),
        (
            "--dataset_name long --max_length 32 --dry_run true",
            "None of the 6 rows of the train dataset has a label left",
        ),
        ("--dataset_name alpaca", f"the data alpaca, .* has the columns instruction, input, output: {COLUMNS}"),
        (
            "--dataset_name alpaca --dry_run true",
            f"the data alpaca, .* has the columns instruction, input, output: {COLUMNS}",
        ),
        ("--dataset_name void", "the data void cannot be read: the folder holds no file"),
        ("--max_length -3", "max_length must be at least 1, got -3$"),
        ("--teacher_cache good", "teacher_cache: good is not empty and no teacher cache: choose another folder$"),
        ("--teacher_cache good/train.jsonl", "teacher_cache: good/train.jsonl is a file: choose another folder$"),
        ("--teacher_model_name_or_path teachr", "teacher_model_name_or_path: there is no folder teachr here"),
        ("--teacher_model_name_or_path cut", "teacher_model_name_or_path: cut/model.safetensors is cut off"),
        ("--model_name_or_path studnt", "model_name_or_path: there is no folder studnt here"),
        ("--top_k 0", "top_k must be at least 1, got 0"),
        ("--cache_dtype int8", "argument --cache_dtype/--cache-dtype: invalid choice: 'int8'"),
    ),
    *of(
        PLAN,
        ("--model_name_or_path studnt", "the configuration of 'studnt' cannot be read"),
        ("--max_length null", "max_length is not set, so nothing says how long a row is: pass --row_tokens$"),
        ("--max_length -3", "max_length must be at least 1, got -3$"),
        ("--device_memory 0", "device_memory must be more than 0, got 0.0"),
        ("--loss target_sft", "loss 'target_sft' needs a teacher"),
    ),
    *of(
        EVAL,
        (
            "--verifier scores.py:five",
            "Verifier scores.py:five returned 5; it must return a bool or a number from 0 to 1",
            1,
        ),
        (
            "--verifier scores.py:fails",
            "Verifier scores.py:fails raised KeyError: 'nope' \\(line 4 of .*scores.py\\)",
            1,
        ),
        ("--verifier scores.py:two", "Verifier scores.py:two must take \\(completion, answer, row\\)"),
        ("--verifier raises.py:f", "Verifier 'raises.py:f': importing raises.py failed with ZeroDivisionError"),
        ("--verifier exakt", "Unknown verifier 'exakt'"),
        ("--model_name_or_path studnt", "The model studnt cannot be read: "),
        ("--model_name_or_path cut", "The weights of the model cut cannot be read: cut/model.safetensors is cut off"),
        ("--model_name_or_path good", "The folder good holds no model \\(no config.json\\)"),
        ("--dataset nothing.jsonl", "The dataset file nothing.jsonl does not exist"),
        ("--dataset zero/train.jsonl", "The dataset zero/train.jsonl has no rows"),
        ("--dataset torn/train.jsonl", "The dataset file torn/train.jsonl cannot be read"),
        ("--dataset void", "The dataset 'void' cannot be loaded"),
        (
            "--prompt_column promt",
            "Row 0 has no column 'promt'; it has prompt, answer. Did you mean --prompt_column prompt",
        ),
        ("--output_dir good/train.jsonl", "--output_dir good/train.jsonl cannot be written: .* is a file"),
        ("--pairs 1", "--pairs are the samples of one model, and need an --output_dir"),
        ("--max_new_tokens 9999", "The model student has 512 positions, too few for a prompt of"),
        ("--k 0", "--k must be at least 1, not 0"),
    ),
    *of(
        "losses",
        ("dtf", "Unknown loss 'dtf'. Did you mean 'dft'\\?"),
        ("raises.py:loss", "Loss 'raises.py:loss': importing raises.py failed with ZeroDivisionError"),
        ("mine.py", "mine.py registers these losses: none. Say which, as mine.py:NAME"),
        ("a b", "error: unrecognized arguments: b"),
    ),
    *of(
        "",
        ("chain --config nowhere.yaml", "cannot read --config nowhere.yaml: No such file or directory$"),
        ("chain --config torn.yaml", "torn.yaml is not plain YAML"),
        ("chain --config problems.jsonl", "problems.jsonl is not plain YAML"),
        (
            "merge --model_name_or_path student --output_dir merged",
            "model_name_or_path: the folder student holds no adapter",
        ),
        ("completion fsh", "error: argument shell: invalid choice: 'fsh'"),
        ("sftt", "error: argument command: invalid choice: 'sftt'"),
        ("--nonsense", "error: unrecognized arguments: --nonsense"),
    ),
]

MISTAKES = [*DATA, *MODELS, *LOSSES, *NUMBERS, *MACHINE, *COMMANDS]


def lines(file: str, rows: list) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def house(tmp_path_factory, tokenizer, request):
    """A folder with models, data and code of every kind of mistake. No row may change it."""
    folder = tmp_path_factory.mktemp("mistakes")
    before = os.getcwd()
    os.chdir(folder)
    try:
        _fill(tokenizer)
    finally:
        os.chdir(before)
    return folder


def _fill(tokenizer) -> None:
    save(make_model(seed=1), tokenizer, Path("student"))
    save(make_model(hidden=48, tie=False, seed=2), tokenizer, Path("teacher"))
    for name in ("cut", "no_shard", "no_weights", "bad_config", "no_tokenizer"):
        save(make_model(seed=1), tokenizer, Path(name))
    weights = Path("cut/model.safetensors").read_bytes()
    Path("cut/model.safetensors").write_bytes(weights[:3000])
    Path("no_weights/model.safetensors").unlink()
    Path("bad_config/config.json").write_text("{bad")
    for file in Path("no_tokenizer").glob("*token*"):
        file.unlink()
    Path("no_shard/model.safetensors").rename("no_shard/model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    Path("no_shard/model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))

    good, chat = make_rows(8), make_rows(4, conversational=True)
    turns = [{"messages": [*row["prompt"], *row["completion"]]} for row in chat]
    for name, rows in {
        "good": good,
        "chat": chat,
        "long": [{"prompt": "x" * 90, "completion": "yes"}] * 6,
        "alpaca": [{"instruction": "a", "input": "b", "output": "c"}] * 4,
        "response": [{"prompt": "a", "text": "ab", "response": "b"}] * 4,
        "mixed": [*turns, *good[:4]],
        "two_forms": [{"prompt": "a", "completion": chat[0]["completion"]}] * 4,
        "both": [{**good[0], **turns[0]}] * 4,
        "numbers": [{"prompt": 1, "completion": 2}] * 4,
        "texts": [{"messages": "hello"}] * 4,
        "turns": [{"conversations": turns[0]["messages"]}] * 4,
        "gap": [*good[:3], {"prompt": "a", "completion": None}],
        "empty_turns": [turns[0], {"messages": []}],
        "zero": [],
        "mute": [turns[0], {"messages": [{"role": "user", "content": None}]}],
        "ids_text": [{"input_ids": "a"}] * 4,
        "ids_float": [{"input_ids": [1.5, 2]}] * 4,
        "ids_below": [{"input_ids": [1, -2]}] * 4,
        "labels_one": [{"input_ids": [1, 2, 3], "labels": 1}] * 4,
        "labels_short": [{"input_ids": [1, 2, 3], "labels": [1, 2]}] * 4,
        "tools": [{**turn, "tools": "{bad"} for turn in turns],
    }.items():
        lines(f"{name}/train.jsonl", rows)
    lines("two_files/a.jsonl", turns)
    lines("two_files/b.jsonl", good[:4])
    lines("problems.jsonl", [{"prompt": "1+1=", "answer": "2"}] * 3)
    Path("void").mkdir()
    Path("torn.parquet").write_bytes(b"PAR1xx")
    lines("notes/readme.md", [])
    lines("torn/train.jsonl", [])
    Path("torn/train.jsonl").write_text('{"prompt": "a", "completion"\n')
    from datasets import Dataset

    Dataset.from_list(good).select([]).save_to_disk("saved_empty")

    Path("raises.py").write_text("import json\n\n1 / 0\n")
    Path("syntax.py").write_text("def loss(:\n")
    Path("exits.py").write_text("import sys\nsys.exit(3)\n")
    Path("mine.py").write_text(
        "from trl_qtarget import Target\ndef none() -> Target:\n    return None\ndef fails() -> Target:\n"
        "    return {}['a']\ndef needs(rate: float) -> Target:\n    return Target()\n"
    )
    Path("scores.py").write_text(
        "def five(completion, answer, row):\n    return 5\n"
        "def fails(completion, answer, row):\n    return row['nope']\n"
        "def two(completion, answer):\n    return 1\n"
    )
    Path("list.yaml").write_text("- a\n- b\n")
    Path("torn.yaml").write_text("a: [1\n")
    Path("refuses.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    Path("broken.jinja").write_text("{% for %}")

    save(make_model(seed=1), tokenizer, Path("finished"))
    for name in ("unfinished", "others"):
        Path(name, "checkpoint-1").mkdir(parents=True)
        Path(name, "checkpoint-1", "trainer_state.json").write_text("{}")
        Path(name, "checkpoint-1", "optimizer.pt").write_text("")
    Path("others/qtarget_run.json").write_text('{"loss": "nll"}')


@pytest.fixture
def in_place_of_the_launcher(monkeypatch):
    """A launch runs the script's `run()` here, with the words that the launcher would hand on."""

    def run(module, own, options, prog):
        monkeypatch.setattr(sys, "argv", [module, *own])
        importlib.import_module(module).run()
        return 0

    return run


def tree(folder: Path) -> dict[str, tuple]:
    found = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*") if path.name != "__pycache__"}
    return {name: (s.st_size, s.st_mtime_ns) for name, s in found.items() if "__pycache__" not in name}


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_a_mistake_is_one_sentence(mistake, house, tmp_path, monkeypatch, in_place_of_the_launcher, capfd):
    monkeypatch.chdir(house)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    installed = preflight._is_installed
    monkeypatch.setattr(preflight, "_is_installed", lambda name: name not in mistake.hidden and installed(name))
    if not mistake.launched:
        monkeypatch.setattr(launching, "launch", in_place_of_the_launcher)
    words = shlex.split(mistake.typed)
    if mistake.settings is not None:
        text = mistake.settings if isinstance(mistake.settings, str) else yaml.safe_dump(mistake.settings)
        (tmp_path / "recipe.yaml").write_text(text)
        words += ["--config", str(tmp_path / "recipe.yaml")]
    before, environment = tree(house), dict(os.environ)

    try:
        code = main(words)
    except SystemExit as ended:
        code = ended.code
    finally:
        os.environ.clear()
        os.environ.update(environment)

    shown = capfd.readouterr()
    assert "Traceback" not in shown.out + shown.err
    said = [line for line in shown.err.splitlines() if line.startswith("trl-qtarget")]
    assert (code, len(said)) == (mistake.code, mistake.lines), shown.err
    command = words[0] if not words[0].startswith("-") and "argument command" not in said[0] else ""
    start = f"trl-qtarget {command}".strip() + ": "
    assert all(line.startswith(start) for line in said)
    line = said[0].removeprefix(start).replace(f"{tmp_path}{os.sep}", "")
    assert re.match(mistake.said, line), line
    assert tree(house) == before
    assert [path.name for path in tmp_path.iterdir()] in ([], ["recipe.yaml"])


def test_the_table_is_long_enough():
    assert len({str(mistake) for mistake in MISTAKES}) == len(MISTAKES) >= 80


# Calls in Python


CALLS = {
    "a loss that nobody knows": (lambda: build("dtf"), "Unknown loss 'dtf'. Did you mean 'dft'"),
    "an argument of a Target": (lambda: build(build("dft"), eta=1), "A Target takes no arguments, got eta"),
    "a number as loss": (lambda: build(3), "A loss is a name, a function that returns a Target, or a Target, got 3"),
    "a function that returns none": (lambda: build(lambda: 3), "must return a Target, it returned int"),
    "a loss of TRL's": (
        lambda: TargetSFTConfig(use_cpu=True, bf16=False, loss_type="dft"),
        "loss_type='dft' is TRL's own option",
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_mistaken_call_is_a_sentence(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, said = CALLS[call]
    with pytest.raises(ValueError, match=re.escape(said)):
        made()
    assert not any(tmp_path.iterdir())


# Processes of their own


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (f"{SFT} --dataset_name alpaca", "trl-qtarget sft: the data alpaca"),
        (f"{SFT} --dataset_name long --max_length 32", "trl-qtarget sft: None of the 6 rows"),
        (f"{CACHE} --dataset_name long --max_length 32 --dry_run true", "trl-qtarget cache: None of the 6 rows"),
        (f"{SFT} --qtarget_backend triton", "trl-qtarget sft: qtarget_backend: "),
        (f"{EVAL} --verifier exakt", "trl-qtarget eval: Unknown verifier 'exakt'"),
    ],
)
def test_a_mistake_in_a_process_of_its_own(typed, said, house):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    before = tree(house)
    words = [sys.executable, "-m", "trl_qtarget", *shlex.split(typed)]
    done = subprocess.run(words, cwd=house, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert next(line for line in done.stderr.splitlines() if line.startswith("trl-qtarget")).startswith(said)
    assert "Traceback" not in done.stderr
    assert tree(house) == before


@pytest.mark.slow
@pytest.mark.parametrize("typed", ["completion bash", "losses", "losses gem", "sft --help"])
def test_a_reader_that_ends_is_no_traceback(typed):
    words = [sys.executable, "-m", "trl_qtarget", *shlex.split(typed)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait(120) in (0, 1)
    assert said == ""
