"""`--print_config`: print each setting of a run, its value, and whether it comes from YAML or the command line."""

import json
import re
import sys
from dataclasses import fields
from typing import Any

from ..theory.presets import find_preset
from .parsing import HUB_TOKEN, Parsed


# names of secrets: `hub_token` but not `eos_token`, and environment variables that end in TOKEN
SECRET = re.compile(r"TOKEN$|(?i:(^|hub_?|hf_?|access_?|auth_?|api_?)token$|key$|secret|passw|(^|_)pass$)|(?<!BY)PASS")
# secrets under any name: a token of the Hub, a key of an API (`sk-...` but not `task-...`), a password in a URL
SECRET_VALUE = re.compile(rf"^hf_|{HUB_TOKEN}|(?<![A-Za-z0-9])sk-[\w-]{{20,}}|//[^/\s]*:[^/\s]*@")


def print_settings(parsed: Parsed, more: dict[str, tuple[Any, str]]) -> None:
    """Print the settings that are not left at their defaults, and then `more`: value and source by name."""
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


def loss_settings(parsed: Parsed) -> dict[str, tuple[Any, str]]:
    """Return value and source, by name, of the loss and each of its arguments."""
    training_args = parsed.values[1]
    given = training_args.loss_kwargs or {}
    rows = {"loss": (training_args.loss, parsed.sources.get("loss", "default"))}
    for name, value in (find_preset(training_args.loss).defaults | given).items():
        rows[f"loss_kwargs.{name}"] = (value, parsed.sources["loss_kwargs"] if name in given else "default")
    return rows


def masked(name: str, value: Any) -> Any:
    """Replace a secret by stars, also inside mappings and lists; other values are returned unchanged."""
    if isinstance(value, dict):
        return {key: masked(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [masked(name, inner) for inner in value]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return value
    return "***" if SECRET.search(name) or SECRET_VALUE.search(str(value)) else value


def _plain(value: Any) -> Any:
    """Return an object's attributes, or its text if it has none, for JSON."""
    return getattr(value, "__dict__", None) or str(value)
