"""`trl-qtarget chain`: check all stages, skip those that are done, run the others, and show the results."""

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..files import write_text
from ..locking import Held, held
from . import execute, page
from .chain_file import Chain, Mistakes, read
from .keys import Record, aside, is_done, is_foreign, keys, newest_checkpoint, record
from .plan import Stage, resolve


PROG = "trl-qtarget chain"
EPILOG = """\
A second run skips stages that are done, and resumes an interrupted stage from its newest checkpoint. A stage runs
again when its settings, its local inputs or a stage that it reads have changed; its old folder is kept as NAME.old-1.
A chain runs on one machine, its stages one after the other, with several processes if they have accelerate's options;
on several machines run the stages' commands by hand.
"""


def main(argv: list[str]) -> int:
    """Run a chain. Return 0, 1 after a stage that failed, 2 after mistakes in the chain, 130 after Ctrl-C."""
    args = make_parser().parse_args(argv)
    try:
        chain = read(args.config)
        with _locked(chain.output_dir, args.dry_run or bool(chain.mistakes)):
            return _run(chain, args)
    except Mistakes as mistakes:
        for mistake in mistakes.args:
            print(f"{PROG}: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description="Run stages from one YAML file.", epilog=EPILOG)
    parser.add_argument("--config", required=True, metavar="FILE", help="the chain: output_dir, defaults, stages")
    parser.add_argument("--dry_run", action="store_true", help="look for mistakes, show the plan, and start nothing")
    parser.add_argument(
        "--from",
        dest="first",
        metavar="NAME",
        help="run this stage and those after it again; those before must be done",
    )
    parser.add_argument("--to", dest="last", metavar="NAME", help="stop after this stage")
    return parser


def _run(chain: Chain, args: argparse.Namespace) -> int:
    from rich.console import Console

    terminal = sys.stdout.isatty()
    # a log has no width: paths in its tables stay whole
    console = Console(markup=False, highlight=False, soft_wrap=not terminal, width=None if terminal else 1000)
    stages = resolve(chain, _options(chain, args.dry_run or bool(chain.mistakes)))
    chain.mistakes.extend(_unknown_stages(stages, args))
    if chain.mistakes:
        _validated(chain, stages, set())
    key_of = keys(stages)
    stages, again = _selected(stages, key_of, args)
    done = {stage.name for stage in stages if stage.name not in again and is_done(stage, key_of[stage.name])}
    ready = _validated(chain, stages, done) if len(done) < len(stages) else {}
    if args.dry_run:
        console.print(_plan(stages, key_of, done, again, ready))
        return 0
    for number, stage in enumerate(stages, start=1):
        if stage.name in done:
            console.print(f"[{number}/{len(stages)}] {stage.name}: done before")
            continue
        console.print(f"[{number}/{len(stages)}] {stage.name}: {stage.command}, log in {stage.log}")
        failure = run_stage(stage, key_of[stage.name], ready[stage.name], stage.name in again, console)
        if failure:
            for line in failure:
                print(line, file=sys.stderr)
            return 1
    records = {stage.name: record(stage.folder) or Record("") for stage in stages}
    report = page.write_page(chain.output_dir, stages, records)
    console.print(page.table(stages, records, done))
    console.print(f"Curves: {report}")
    return 0


def _validated(chain: Chain, stages: list[Stage], done: set[str]) -> dict[str, Any]:
    """Return the stages that are not done, ready to run.

    Raises:
        Mistakes: all that are found in the chain.
    """
    from .inputs import full_disk
    from .validate import validate

    ready, wrong = validate(stages, done)
    mistakes = [*chain.mistakes, *wrong]
    mistakes += [
        f"stage {stage.name}: {stage.folder} is no stage of a chain: choose another output_dir or name"
        for stage in stages
        if is_foreign(stage)
    ]
    mistakes += full_disk([stage for stage in stages if stage.name not in done], chain.output_dir)
    if mistakes:
        raise Mistakes(*mistakes)
    return ready


def _unknown_stages(stages: list[Stage], args: argparse.Namespace) -> Iterator[str]:
    """Yield a mistake for each option that names no stage."""
    names = [stage.name for stage in stages]
    for option, name in (("--from", args.first), ("--to", args.last)):
        if name is not None and name not in names:
            yield f"{option} {name}: there is no such stage, there are {', '.join(names)}"


def _selected(stages: list[Stage], key_of: dict[str, str], args: argparse.Namespace) -> tuple[list[Stage], set[str]]:
    """Return the stages up to `--to`, and the names of those that are done and that `--from` runs again."""
    names = [stage.name for stage in stages]
    stages = stages[: names.index(args.last) + 1 if args.last else None]
    start = names.index(args.first) if args.first else 0
    if start >= len(stages):
        raise Mistakes(f"--from {args.first} comes after --to {args.last}")
    if args.first is None:
        return stages, set()
    for stage in stages[:start]:
        if not is_done(stage, key_of[stage.name]):
            raise Mistakes(f"--from {args.first}: stage {stage.name} before it is not done with these settings")
    return stages, {stage.name for stage in stages[start:] if is_done(stage, key_of[stage.name])}


# One stage


def run_stage(stage: Stage, key: str, ready: Any, again: bool, console: Any) -> list[str]:
    """Run a stage to its end. Return the lines that say how it failed, none if it did not."""
    orphans = execute.end_orphans(stage.folder)
    if orphans:
        console.print(f"  ended {orphans} process(es) that a killed chain had left behind")
    last = record(stage.folder)
    if last is not None and (again or last.key != key):
        kept = aside(stage.folder)
        console.print(f"  the last run's folder {stage.folder} is kept as {kept}")
        stage.folder.rename(kept)
        last = None
    now = last or Record(key)
    now.state, now.attempts, now.versions = "running", now.attempts + 1, _versions()
    now.words = ready.words
    now.save(stage.folder)
    checkpoint = newest_checkpoint(stage.output)
    if checkpoint is None and stage.command != "cache":  # a cache resumes from its own shards
        shutil.rmtree(stage.output, ignore_errors=True)
    if checkpoint is not None:
        console.print(f"  goes on from {checkpoint}")
    elif ready.unchecked:
        console.print(f"  {_not_checked(ready)}")
    by_hand = shlex.join([*stage.command_line, *ready.words])
    write_text(stage.config, f"# {by_hand}\n" + yaml.safe_dump(ready.settings, sort_keys=False))
    words = [*stage.command_line[1:], *ready.words]
    words += ["--resume_from_checkpoint", str(checkpoint)] if checkpoint else []
    return _attempt(stage, now, words, checkpoint is None, console)


def _attempt(stage: Stage, now: Record, words: list[str], fresh: bool, console: Any) -> list[str]:
    """Run a stage's command, and record how it ended. Return the lines that say how it failed, none if it did not."""
    start, before = time.perf_counter(), now.seconds
    try:
        with console.status(stage.name) as status:
            code = execute.execute(stage, words, fresh, lambda row: status.update(f"{stage.name}: {_line(row)}"))
        why = f"exit code {code}" if code else None
        if code == 130:
            raise KeyboardInterrupt
    except execute.StepZero as wrong:
        why = str(wrong)
        shutil.rmtree(stage.output, ignore_errors=True)  # a next attempt must not resume from it
    finally:
        now.seconds = round(before + time.perf_counter() - start, 2)
        now.save(stage.folder)
    if why is None and not stage.output.is_dir():
        why = f"it made no {stage.output}"
    now.state = "failed" if why else "done"
    now.metric = page.main_metric(stage)
    now.save(stage.folder)
    if why is None:
        console.print(f"  {now.seconds:.0f} s  {now.metric}")
        return []
    ending = [f"    {line}" for line in execute.last_lines(stage.log)]
    by_hand = shlex.join(["trl-qtarget", *words])
    return [f"{PROG}: stage {stage.name} failed: {why}", *ending, f"  log: {stage.log}", f"  by hand: {by_hand}"]


def _line(row: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in list(row.items())[:8])


def _versions() -> dict[str, str]:
    return {"trl-qtarget": __version__} | {name: version(name) for name in ("trl", "transformers", "torch")}


# Around the stages


def _options(chain: Chain, dry: bool) -> dict[str, list[str]]:
    """Return the names of each command's options, from a file of the chain where it has one of the same versions.

    Asking the commands loads all of TRL, which would take seconds for a chain whose stages are all done.
    """
    commands = {"merge", *(entry.command for entry in chain.entries if entry.command is not None)}
    file, versions = chain.output_dir / "options.json", _versions()
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["versions"] == versions and commands <= kept["options"].keys():
            return kept["options"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    from .validate import options

    known = {command: options(command) for command in sorted(commands)}
    if not dry:
        write_text(file, json.dumps({"versions": versions, "options": known}) + "\n")
    return known


@contextmanager
def _locked(folder: Path, dry: bool) -> Iterator[None]:
    """Make a chain's folder and keep other chains out of it; a dry run, or one with mistakes, does neither."""
    if dry:
        yield
        return
    new = not folder.exists()
    with ExitStack() as lock:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.enter_context(held(folder))
        except OSError as mistake:
            raise Mistakes(f"output_dir {folder}: {mistake.strerror}") from None
        except Held as holder:
            raise Mistakes(
                f"another chain runs in {folder} ({holder}): wait for it, or choose another output_dir"
            ) from None
        try:
            yield
        except Mistakes:
            lock.close()
            if new:
                shutil.rmtree(folder)  # nothing was started
            raise


def _plan(stages: list[Stage], key_of: dict[str, str], done: set[str], again: set[str], ready: dict[str, Any]) -> Any:
    """Return the table that a dry run shows."""
    from rich.table import Table

    table = Table("stage", "command", "reads", "writes", "what happens", box=None, pad_edge=False)
    for stage in stages:
        happens = _what_happens(stage, key_of[stage.name], done, again)
        if stage.name in ready and ready[stage.name].unchecked:
            happens += f"; {_not_checked(ready[stage.name])}"
        reads = ", ".join(earlier.name for earlier in stages if earlier.name in stage.reads)
        table.add_row(stage.name, stage.command, reads, str(stage.output), happens)
    return table


def _not_checked(ready: Any) -> str:
    return f"step 0 is not checked: {ready.unchecked}"


def _what_happens(stage: Stage, key: str, done: set[str], again: set[str]) -> str:
    last = record(stage.folder)
    if stage.name in done:
        return "done before, skipped"
    if last is None:
        return "runs"
    if stage.name in again:
        return "runs again, the old one is kept aside"
    if last.key != key:
        return "has changed: runs, the old one is kept aside"
    checkpoint = newest_checkpoint(stage.output)
    return f"goes on from {checkpoint.name}" if checkpoint else "starts again"
