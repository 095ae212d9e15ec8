"""Models under evaluation: everything that can be checked before the weights are read, and then the weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.prompts import prompt_ids
from ..files import CONFIGS, cut_weights, is_path
from .problems import Problem


@dataclass(frozen=True)
class Subject:
    """A model under evaluation whose weights are not read yet.

    `label` is a short name that is fit for a file's name; `prompts` are the problems as token ids of its tokenizer.
    """

    name: str
    label: str
    tokenizer: Any
    prompts: list[list[int]]


def labels(names: list[str]) -> list[str]:
    """Return a distinct short name for each model: the fewest last components of its path, fit for a file's name."""
    parts = [[p for p in Path(name).parts if p not in ("/", ".", "..")] or [name] for name in names]
    for length in range(1, max(map(len, parts)) + 1):
        short = ["-".join(p[-length:]) for p in parts]
        if len(set(short)) == len(names):
            return short
    return [f"model-{i}" for i in range(len(names))]  # for example a/b and a-b


def check_folder(name: str) -> None:
    """Refuse a folder that does not exist or holds no model; names that can be on the Hub are not checked.

    Raises:
        ValueError: the folder or a file in it is missing; the message names a folder below it that holds a model.
    """
    folder = Path(name)
    if not folder.is_dir():
        if is_path(name):
            raise ValueError(f"The model folder {name} does not exist.")
        return
    if not any((folder / file).is_file() for file in CONFIGS):
        inside = sorted(file.parent.name for file in folder.glob("*/config.json"))
        hint = f" {folder / inside[-1]} does." if inside else ""
        raise ValueError(f"The folder {name} holds no model (no config.json).{hint}")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"The folder {name} holds no *.safetensors, and no other format of weights is read.")
    cut = cut_weights(folder)
    if cut is not None:
        raise ValueError(f"The weights of the model {name} cannot be read: {cut}.")


def examine(
    name: str, label: str, problems: list[Problem], max_new_tokens: int, trust_remote_code: bool = False
) -> Subject:
    """Load the model's tokenizer and tokenize the problems.

    Raises:
        ValueError: the model has no tokenizer, no chat template, or too few positions for a prompt and its completion.
    """
    from transformers import AutoTokenizer

    if Path(name).is_dir() and not any(Path(name).glob("*token*")):
        raise ValueError(f"The model {name} has no tokenizer: save the tokenizer into the same folder.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        positions = context_length(name, trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(f"The model {name} cannot be read: {first_line}") from error
    prompts = [tokenize(tokenizer, name, i, problem) for i, problem in enumerate(problems)]
    longest = max(map(len, prompts))
    if positions is not None and longest + max_new_tokens > positions:
        raise ValueError(
            f"The model {name} has {positions} positions, too few for a prompt of {longest} tokens and "
            f"--max_new_tokens {max_new_tokens}: lower --max_new_tokens."
        )
    return Subject(name, label, tokenizer, prompts)


def context_length(name: str, trust_remote_code: bool) -> int | None:
    """Return the number of positions of a model, or of the base model of an adapter; None if its config has none."""
    from transformers import AutoConfig

    if Path(name, "adapter_config.json").is_file() and not Path(name, "config.json").is_file():
        from peft import PeftConfig

        name = PeftConfig.from_pretrained(name).base_model_name_or_path or name
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def tokenize(tokenizer, name: str, i: int, problem: Problem) -> list[int]:
    """Tokenize the prompt of row `i` as the trainer does; messages end with the template's generation prompt.

    Raises:
        ValueError: the prompt is empty, or consists of messages and the tokenizer's chat template is missing or
            refuses them.
    """
    from jinja2 import TemplateError

    if not isinstance(problem.prompt, str) and tokenizer.chat_template is None:
        raise ValueError(f"The prompts are messages, and the model {name} has no chat template to write them with.")
    try:
        ids = prompt_ids(tokenizer, problem.prompt, problem.row)
    except TemplateError as error:
        raise ValueError(f"The chat template of {name} refuses the prompt of row {i}: {error}") from error
    if not ids:
        raise ValueError(f"The prompt of row {i} is empty in the tokens of {name}.")
    return ids


def load(subject: Subject, dtype: str = "auto", trust_remote_code: bool = False):
    """Load the model for generation, on the accelerator if the machine has one."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        subject.name, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return model.to(device or "cpu").eval()


def eos_ids(model, tokenizer) -> list[int]:
    """Return the ids that end a completion: the tokenizer's, and those in the model's generation settings."""
    ids = model.generation_config.eos_token_id
    listed = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*listed, tokenizer.eos_token_id] if i is not None})
