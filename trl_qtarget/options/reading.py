"""Read YAML settings strictly, by the types of the options that they set.

If YAML reads a value as the option's type, that value is taken. Otherwise its text is converted as on the command
line: YAML reads `1e-3` as a text and `no` as false, but a numeric option gets 0.001, and an option with a choice `no`
gets that word.
"""

import argparse
import difflib
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml


TAKES_BOOL = ("resume_from_checkpoint", "fsdp")  # Transformers also takes booleans here, which its types do not say
# current names of options, by an old or short name too different for difflib
CURRENT_NAMES = {
    "torch_dtype": "dtype",
    "dataset_mixture": "datasets",
    "no_cuda": "use_cpu",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "model": "model_name_or_path",
    "teacher": "teacher_model_name_or_path",
    "teacher_model": "teacher_model_name_or_path",
}
TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}
UNSET = object()


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the most similar known word, or an empty text."""
    # reversed, so that the first spelling wins, which has underscores
    bare = {name.lstrip("-").replace("-", "_"): name for name in reversed(list(known))}
    word = word.lstrip("-").replace("-", "_")
    guess = [CURRENT_NAMES[word]] if CURRENT_NAMES.get(word) in bare else difflib.get_close_matches(word, bare, n=1)
    guess = ["loss"] if guess == ["loss_type"] and "loss" in bare else guess  # TRL's option for its own losses
    return f" (did you mean {bare[guess[0]]!r}?)" if guess else ""


def load(file: str) -> list[tuple[str, yaml.Node]]:
    """Return the settings of a YAML file as pairs of name and node, whose values `read` converts.

    Raises:
        ValueError: the file cannot be read, is not plain YAML, or holds no settings.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
        yaml.safe_load(text)  # refuses tags and keys that compose accepts
        top = yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"cannot read --config {file}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{file} is not plain YAML: {error.problem}{line}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file} is not plain YAML: {error}") from None
    if not isinstance(top, yaml.MappingNode):
        raise ValueError(f"{file} must hold settings as `name: value` lines")
    names = [name.value for name, _ in top.value]
    twice = sorted({name for name in names if names.count(name) > 1 and name != "<<"})
    if twice:
        raise ValueError(f"{file} sets {', '.join(twice)} twice")
    yaml.SafeLoader("").flatten_mapping(top)
    return list({name.value: node for name, node in top.value}.items())


def environment(node: yaml.Node) -> dict[str, str]:
    """Return the environment variables under the key `env`.

    Raises:
        ValueError: `env` is no mapping.
    """
    values = _value(node)
    if not isinstance(values, dict):
        raise ValueError(f"must be a mapping, got {values!r}")
    return {str(name): str(value) for name, value in values.items()}


def read(action: argparse.Action, hint: Any, node: yaml.Node) -> Any:
    """Convert a YAML node to a value of the option, whose field has the type `hint`.

    Raises:
        ValueError: the value has another type or is none of the choices; the message says what it must be.
    """
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = {get_origin(member) or member: get_args(member) for member in members}
    if action.dest in TAKES_BOOL or False in kinds.get(Literal, ()):
        kinds[bool] = ()
    value = _value(node)
    if list in kinds and isinstance(value, list):
        return [_entry(action, kinds[list][0], item) for item in node.value]
    if type(value) in kinds:
        made = value
    elif list in kinds and str not in kinds:
        made = [_entry(action, kinds[list][0], node)]  # one value stands for a list of one
    else:
        convert: Any = action.type  # never None: HfArgumentParser gives every option a type
        try:
            made = convert(node.value) if isinstance(node, yaml.ScalarNode) and value is not None else UNSET
        except (ValueError, argparse.ArgumentTypeError):
            made = UNSET
        if made is UNSET:
            wanted = " or ".join(word for kind, word in TYPE_NAMES.items() if kind in kinds) or "one value"
            raise ValueError(f"must be {wanted}, got {value!r}")
    if action.choices is not None and made is not None and made not in action.choices:
        raise ValueError(f"must be one of {', '.join(map(str, action.choices))}, got {value!r}")
    return made


def _entry(action: argparse.Action, hint: Any, node: yaml.Node) -> Any:
    """Convert one entry of a list; the entries of `datasets` are mappings, whose keys are checked."""
    if not is_dataclass(hint):
        return read(action, hint, node)
    value = _value(node)
    if not isinstance(value, dict):
        raise ValueError(f"must be a list of mappings, got {value!r}")
    known = {f.name: f for f in fields(hint)}
    for name in value:
        if name not in known:
            raise ValueError(f"has an entry with an unknown key {name!r}{nearest(str(name), known)}")
    for f in known.values():
        if f.default is f.default_factory is MISSING and f.name not in value:
            raise ValueError(f"has an entry without {f.name!r}")
    return value


def launcher_words(name: str, action: argparse.Action, node: yaml.Node) -> list[str]:
    """Write a YAML setting in the form of accelerate's command line."""
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError("must be one value")
    if node.tag.endswith(":null"):
        return []
    if action.nargs == 0:
        value = _value(node)
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, got {value!r}")
        return [f"--{name}"] if value else []
    return [f"--{name}={node.value}"]


def _value(node: yaml.Node) -> Any:
    return yaml.SafeLoader("").construct_document(node)
