"""The `trl-qtarget` command: TRL's commands with `sft` replaced, and the commands that this package adds.

This module imports no torch, so that help and the table of losses are shown at once.
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from .. import compat
from ..theory.presets import PRESETS, Preset, find_preset
from ..theory.target import NEEDS


PROG = "trl-qtarget"


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit code; 1 if the reader of its output, such as `head`, has ended."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends
        return 1


def _run(argv: list[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else None
    if command in COMMANDS:
        try:
            return COMMANDS[command](argv[1:])
        except KeyboardInterrupt:
            return 130
    others = _commands_of_trl()
    if command is not None and (command in others or (not others and not command.startswith("-"))):
        return _run_trl(argv)
    parser = make_parser()
    print("\n".join(compat.about()) if parser.parse_args(argv).version else parser.format_help())
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return a parser of all commands, each with its purpose and without its options."""
    parser = argparse.ArgumentParser(prog=PROG, allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="show the versions that matter and exit")
    subparsers = parser.add_subparsers(help="available commands", dest="command", metavar="command")
    for name, text in ({name: run.__doc__ for name, run in COMMANDS.items()} | _commands_of_trl()).items():
        subparsers.add_parser(name, help=text)
    return parser


def sft(argv: list[str]) -> int:
    """Run the SFT training script, with --loss and a teacher"""
    from ..scripts import sft as script

    return _launch(script, f"{PROG} sft", argv)


def cache(argv: list[str]) -> int:
    """Score a teacher once on the rows of a recipe, for --teacher_cache"""
    from ..scripts import cache as script

    return _launch(script, f"{PROG} cache", argv)


def plan(argv: list[str]) -> int:
    """Predict the memory of a recipe on each device, before anything is loaded"""
    from ..options.parsing import fail
    from ..scripts import plan as script

    prog = f"{PROG} plan"
    parsed = _parsed(script, prog, argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the training itself will show them
            return 0 if parsed is None else script.main(parsed)
    except ValueError as mistake:
        fail(prog, mistake)


def evaluate(argv: list[str]) -> int:
    """Measure Average@k of one or more models on problems with known answers"""
    from ..scripts import eval as script

    script.main(*script.make_parser(prog=f"{PROG} eval").parse_args_and_config(argv))
    return 0


def merge(argv: list[str]) -> int:
    """Merge a LoRA adapter into its base model, and check the result"""
    from ..scripts import merge as script

    script.main(*script.make_parser(prog=f"{PROG} merge").parse_args_and_config(argv))
    return 0


def chain(argv: list[str]) -> int:
    """Run stages (sft, dpo, grpo, ...) from one YAML file, resumable"""
    from ..chain import run

    return run.main(argv)


def losses(argv: list[str]) -> int:
    """List the losses, or describe one of them"""
    name = _losses_parser().parse_args(argv).name
    try:
        _print(_table() if name is None else _description(name, find_preset(name)))
    except ValueError as mistake:
        print(f"{PROG} losses: {mistake}", file=sys.stderr)
        return 2
    return 0


def completion(argv: list[str]) -> int:
    """Print a script for your shell, which then completes commands, options and losses"""
    import shtab

    parser = argparse.ArgumentParser(prog=f"{PROG} completion", description=completion.__doc__)
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    shell = parser.parse_args(argv).shell
    from ..chain.run import make_parser as chain_parser
    from .shell_completion import script

    light = {"chain": chain_parser(), "losses": _losses_parser(), "completion": parser}
    print(script(shell, make_parser(), light))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "sft": sft,
    "cache": cache,
    "plan": plan,
    "merge": merge,
    "chain": chain,
    "losses": losses,
    "eval": evaluate,
    "completion": completion,
}


def _losses_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"{PROG} losses", description=losses.__doc__)
    parser.add_argument("name", nargs="?", help="a loss of the list, or yours as my_module:my_loss or file.py:my_loss")
    return parser


def _launch(script: Any, prog: str, argv: list[str]) -> int:
    """Run a script under accelerate's launcher, if its command line has no mistake. Return its exit code."""
    from ..options import launching

    parsed = _parsed(script, prog, argv)
    return 0 if parsed is None else launching.launch(script.__name__, parsed.own, parsed.launch, prog)


def _parsed(script: Any, prog: str, argv: list[str]) -> Any:
    """Parse the command line of a script. Return None if --print_config has shown its settings instead.

    Mistakes are printed, and end the process with exit code 2.
    """
    from ..options import print_config
    from ..options.parsing import fail

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the script itself will show them
        parsed = script.make_parser(prog=prog).parse(argv)
    if parsed.options.print_config:
        print_config.print_settings(parsed, print_config.loss_settings(parsed))
        return None
    mistakes = script.mistakes(*parsed.values)
    if mistakes:
        fail(prog, *mistakes)
    return parsed


def _commands_of_trl() -> dict[str, str]:
    """Return TRL's other commands and their help. Without TRL's list, which is private, every command is passed on."""
    return {name: text for name, text in compat.trl_commands().items() if name not in COMMANDS}


def _run_trl(argv: list[str]) -> int:
    """Run a command of TRL. Return its exit code."""
    try:
        return compat.run_trl(argv)
    except subprocess.CalledProcessError as ended:  # the launcher's traceback would hide the script's own message
        return ended.returncode if ended.returncode >= 0 else 128 - ended.returncode


def _print(content: Any) -> None:
    from rich.console import Console

    # in a file or a pipe each loss is one line, so that grep finds it whole
    Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 250).print(content)


def _table() -> Any:
    """Return the table of losses."""
    from rich.table import Table

    table = Table("loss", "formula", "needs", "paper", box=None, pad_edge=False)
    for name, preset in PRESETS.items():
        table.add_row(name, " ".join(preset.formula.splitlines()), ", ".join(preset.needs), preset.paper)
    return table


def _description(name: str, preset: Preset) -> str:
    """Return the page of one loss: its formula, arguments, needs and paper, and how to train with it."""
    hints = get_type_hints(preset.make, include_extras=True)
    arguments = [f"{key} = {value!r}    ({_range(key, hints.get(key))})" for key, value in preset.defaults.items()]
    rest = inspect.cleandoc(preset.make.__doc__ or "").split("\n\n")[2:]
    usage = f"{PROG} sft --loss {name}"
    yaml = f"loss: {name}"
    if preset.defaults:
        usage += f" --loss_kwargs '{json.dumps(preset.defaults)}'"
        yaml += f"\nloss_kwargs: {json.dumps(preset.defaults)}"
    parts = {
        "formula": preset.formula,
        "arguments": "\n".join(arguments) or "none",
        "needs": "\n".join(NEEDS.get(need, need) for need in preset.needs) or "nothing but the data",
        "paper": "none" if preset.paper == "-" else f"https://huggingface.co/papers/{preset.paper}",
        "command": usage,
        "YAML": yaml,
    }
    lines = [f"{key:<11}" + text.replace("\n", "\n" + " " * 11) for key, text in parts.items()]
    return "\n\n".join([f"{name}: {preset.summary}", *rest, *lines])


def _range(name: str, hint: Any) -> str:
    """Return the values that an argument of a loss may have, from its type."""
    if get_origin(hint) is Annotated:
        return get_args(hint)[1].text.format(name)
    return " or ".join(map(repr, get_args(hint))) or "any"
