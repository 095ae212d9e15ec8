"""`--print_config`: what a command line and its YAML file came to, and where each setting is from."""

import json
import re
import sys
from dataclasses import fields
from typing import Any

from ..theory.presets import find_preset
from .parsing import Parsed


# tokens of texts (`eos_token`) are none; in the environment every TOKEN is one
SECRET = re.compile(r"TOKEN$|(?i:(^|hub_?|hf_?|access_?|auth_?|api_?)token$|key$|secret|passw|(^|_)pass$)|(?<!BY)PASS")
# a token of the Hub, one of an API, a password in an address; `task-...` is none
SECRET_VALUE = re.compile(r"^hf_|hf_[A-Za-z0-9]{20,}|(?<![A-Za-z0-9])sk-[\w-]{20,}|//[^/\s]*:[^/\s]*@")


def show(parsed: Parsed, more: dict[str, tuple[Any, str]]) -> None:
    """Print the settings that somebody made, and `more`: value and source by name."""
    from rich.console import Console
    from rich.table import Table

    table = Table("setting", "value", "from", box=None, pad_edge=False)
    given = {f.name: getattr(values, f.name) for values in parsed.values for f in fields(values)}
    rows = {name: (value, parsed.sources[name]) for name, value in given.items() if name in parsed.sources}
    if parsed.launch:
        rows["accelerate launch"] = (re.sub(r"(--aws\S*?[= ])\S+", r"\1***", " ".join(parsed.launch)), "")
    for name, (value, source) in (rows | more).items():
        shown = masked(name, value)
        table.add_row(name, shown if isinstance(shown, str) else json.dumps(shown, default=_plain), source)
    Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 250).print(table)


def of_loss(parsed: Parsed) -> dict[str, tuple[Any, str]]:
    """The loss and its arguments, value and source by name."""
    training_args = parsed.values[1]
    given = training_args.loss_kwargs or {}
    rows = {"loss": (training_args.loss, parsed.sources.get("loss", "default"))}
    for name, value in (find_preset(training_args.loss).defaults | given).items():
        rows[f"loss_kwargs.{name}"] = (value, parsed.sources["loss_kwargs"] if name in given else "default")
    return rows


def masked(name: str, value: Any) -> Any:
    """`value`, or stars if it is a secret; inside mappings and lists too."""
    if isinstance(value, dict):
        return {key: masked(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [masked(name, inner) for inner in value]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return value
    return "***" if SECRET.search(name) or SECRET_VALUE.search(str(value)) else value


def _plain(value: Any) -> Any:
    return getattr(value, "__dict__", None) or str(value)
