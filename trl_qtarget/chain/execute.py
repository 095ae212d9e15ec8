"""Runs a stage's command, reads its log as it grows, and stops it when its first step is not what it must be.

The command writes its log file itself, so nothing of it is lost when the chain is killed. Metrics are the mappings
that trainers print; that needs no hook in them, and works for every command and every number of processes.
"""

import ast
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from .plan import Stage


MARK = "TRL_QTARGET_STAGE"  # in the environment of a stage's processes: its folder
METRICS = re.compile(r"\{'[^{}]*\}")
STEP0 = {  # what must be zero while the model is still its own reference, and what it means if it is not
    "rewards/chosen": "the reward of chosen completions against the reference",
    "rewards/rejected": "the reward of rejected completions against the reference",
    "rewards/margins": "the margin against the reference",
    "kl": "the divergence from the reference",
    "clip_ratio/region_mean": "the share of tokens whose ratio to the sampling policy is clipped",
}
POLL = 0.2  # seconds


class StepZero(RuntimeError):
    """The first step of a stage shows that its model is not its reference."""


def metrics(lines: Iterable[str]) -> list[dict[str, float]]:
    """The mappings of numbers among a log's lines, in their order."""
    found = []
    for line in lines:
        for text in METRICS.findall(line):
            with suppress(ValueError, SyntaxError, TypeError):
                values = ast.literal_eval(text)
                found.append({str(name): float(value) for name, value in values.items()})
    return found


def history(log: Path) -> list[dict[str, float]]:
    """A stage's metrics over all attempts; steps that were repeated after a resume count once, as the last time."""
    rows = metrics(log.read_text(encoding="utf-8", errors="replace").splitlines()) if log.is_file() else []
    kept: list[dict[str, float]] = []
    for row in rows:
        now = row.get("epoch", math.inf)
        start = len(kept)
        while start and kept[start - 1].get("epoch", -math.inf) >= now:
            start -= 1
        # of the same moment there may be an evaluation or a summary too
        again = (i for i, old in enumerate(kept[start:], start) if old["epoch"] > now or old.keys() == row.keys())
        del kept[next(again, len(kept)) :]
        kept.append(row)
    return kept


def check_step0(stage: Stage, first: dict[str, float]) -> None:
    """Whether the model was its own reference, from the metrics of the first step, which come before its update.

    DPO, KTO: log pi - log pi_ref = 0, so every reward is 0. GRPO, RLOO: KL(pi, pi_ref) = 0 where there is a reference
    (beta > 0), and no ratio to the sampling policy is clipped, as it is 1.

    Raises:
        StepZero: which metric says otherwise, and what may be the reason.
    """
    names = STEP0 if stage.command != "kto" else {name: text for name, text in STEP0.items() if name != "kl"}
    if stage.tolerance is None:
        return
    for name, meaning in names.items():
        value = first.get(name, 0.0)
        if not abs(value) <= stage.tolerance:
            raise StepZero(
                f"at the first step {name} is {value:g}, not 0 within {stage.tolerance:g}: {meaning} is there before "
                "anything was learned. The stage compares its model with another one (look at its reference, its "
                "adapters and its dropout). step0_tolerance in its settings moves the limit, null turns this off"
            )


def execute(
    stage: Stage, words: list[str], fresh: bool, show: Callable[[dict[str, float]], None] = lambda row: None
) -> int:
    """Run `trl-qtarget` with `words` into the stage's log. Returns its exit code.

    `fresh`: it starts at its first step, which is checked.

    Raises:
        StepZero: it was stopped after its first step.
    """
    from ..options.launching import children_stopped

    environment = os.environ | {MARK: str(stage.folder.resolve()), "PYTHONUNBUFFERED": "1"}
    call = [sys.executable, "-m", "trl_qtarget", *words]
    process = None
    with stage.log.open("w" if fresh else "a", encoding="utf-8") as log:
        start = log.tell()
        try:
            with children_stopped():
                process = subprocess.Popen(call, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
                for row in _rows(stage.log, start, process):
                    show(row)
                    if fresh:
                        fresh = False
                        check_step0(stage, row)
                return process.returncode
        finally:
            if process is not None:
                process.wait()  # it has ended, or was


def _rows(log: Path, start: int, process: subprocess.Popen) -> Iterator[dict[str, float]]:
    """The metrics that a process writes into its log, until it ends."""
    with log.open(encoding="utf-8", errors="replace", newline="") as reader:
        reader.seek(start)
        rest, ended = "", False
        while not ended:
            ended = process.poll() is not None
            *lines, rest = re.split(r"[\r\n]", rest + reader.read())
            yield from metrics([*lines, rest] if ended else lines)
            if not ended:
                time.sleep(POLL)


def end_orphans(folder: Path) -> int:
    """End what a killed chain left running in a stage's folder. Returns how many processes that were."""
    orphans = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == str(folder.resolve()):
                orphans.append(process)
    for process in orphans:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(orphans, timeout=10)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=10)
    return len(orphans)


def last_lines(log: Path, number: int = 15) -> list[str]:
    """The end of a log, without progress bars and empty lines."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line.rstrip() for line in re.split(r"[\r\n]", text)]
    return [line for line in lines if line.strip() and not re.search(r"\d+%\|", line)][-number:]
