"""Models as they are evaluated: what can be checked of them first, and then their weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .problems import Problem


@dataclass(frozen=True)
class Subject:
    """A model before its weights are read: `label` is its short name, `prompts` are the problems in its tokens."""

    name: str
    label: str
    tokenizer: Any
    prompts: list[list[int]]


def labels(names: list[str]) -> list[str]:
    """Each model's last path component, or more of the path where two are called the same; fit for a file's name."""
    parts = [[p for p in Path(name).parts if p not in ("/", ".", "..")] or [name] for name in names]
    for length in range(1, max(map(len, parts)) + 1):
        short = ["-".join(p[-length:]) for p in parts]
        if len(set(short)) == len(names):
            return short
    return [f"model-{i}" for i in range(len(names))]  # as with a/b and a-b


def check_folder(name: str) -> None:
    """Refuse a folder that holds no model. Other names are the Hub's.

    Raises:
        ValueError: what is missing, and where it may be.
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
            raise ValueError(f"The model folder {name} does not exist.")
        return
    if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        inside = sorted(file.parent.name for file in folder.glob("*/config.json"))
        hint = f" {folder / inside[-1]} does." if inside else ""
        raise ValueError(f"The folder {name} holds no model (no config.json).{hint}")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"The folder {name} holds no weights as safetensors, the only kind that is read.")


def examine(
    name: str, label: str, problems: list[Problem], max_new_tokens: int, trust_remote_code: bool = False
) -> Subject:
    """The model's tokenizer and the problems in its tokens.

    Raises:
        ValueError: it has no tokenizer or chat template, or too few positions.
    """
    from transformers import AutoTokenizer

    if Path(name).is_dir() and not any(Path(name).glob("*token*")):
        raise ValueError(f"The model {name} has no tokenizer: save it into the same folder.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        positions = context_length(name, trust_remote_code)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(f"The model {name} cannot be read: {first_line}") from error
    prompts = [tokenize(tokenizer, name, i, problem.prompt) for i, problem in enumerate(problems)]
    longest = max(map(len, prompts))
    if positions is not None and longest + max_new_tokens > positions:
        raise ValueError(
            f"The model {name} has {positions} positions, too few for a prompt of {longest} tokens and "
            f"--max_new_tokens {max_new_tokens}: lower it."
        )
    return Subject(name, label, tokenizer, prompts)


def context_length(name: str, trust_remote_code: bool) -> int | None:
    from transformers import AutoConfig

    if Path(name, "adapter_config.json").is_file() and not Path(name, "config.json").is_file():
        from peft import PeftConfig

        name = PeftConfig.from_pretrained(name).base_model_name_or_path or name
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def tokenize(tokenizer, name: str, i: int, prompt: str | list[dict]) -> list[int]:
    """A prompt as the trainer would tokenise it: a text as it is, messages with the template's generation prompt."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif tokenizer.chat_template is None:
        raise ValueError(f"The prompts are messages, and the model {name} has no chat template to write them with.")
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    if not ids:
        raise ValueError(f"The prompt of row {i} is empty in the tokens of {name}.")
    return ids


def load(subject: Subject, dtype: str = "auto", trust_remote_code: bool = False):
    """The model on the accelerator, if there is one, ready to generate."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        subject.name, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return model.to(device or "cpu").eval()


def eos_ids(model, tokenizer) -> list[int]:
    """The tokens that end a completion: the tokenizer's, and those of the model's generation settings."""
    ids = model.generation_config.eos_token_id
    listed = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*listed, tokenizer.eos_token_id] if i is not None})
