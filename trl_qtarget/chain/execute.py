"""Runs a stage's command, reads its log as it grows, and stops it when its first step shows a wrong reference model.

The command writes its log file itself, so that no line is lost when the chain is killed. Metrics are the mappings that
trainers print. Reading them needs no hook in a trainer, and works for every command and any number of processes.
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


MARK = "TRL_QTARGET_STAGE"  # the environment variable by which a stage's processes are found: it holds its folder
METRICS = re.compile(r"\{'[^{}]*\}")
STEP0 = {  # the metrics that are zero as long as the model equals its reference, and what each one measures
    "rewards/chosen": "the reward of chosen completions against the reference",
    "rewards/rejected": "the reward of rejected completions against the reference",
    "rewards/margins": "the margin against the reference",
    "kl": "the divergence from the reference",
    "clip_ratio/region_mean": "the share of tokens whose ratio to the sampling policy is clipped",
}
POLL = 0.2  # seconds between two looks at a log


class StepZero(RuntimeError):
    """A first step which shows that the model of a stage does not equal its reference."""


def metrics(lines: Iterable[str]) -> list[dict[str, float]]:
    """Return the mappings of numbers in a log's lines, in their order."""
    rows = []
    for line in lines:
        for text in METRICS.findall(line):
            with suppress(ValueError, SyntaxError, TypeError):
                values = ast.literal_eval(text)
                rows.append({str(name): float(value) for name, value in values.items()})
    return rows


def history(log: Path) -> list[dict[str, float]]:
    """Return a stage's metrics over all attempts; of steps that a resumed attempt repeated, only the last values."""
    rows = metrics(log.read_text(encoding="utf-8", errors="replace").splitlines()) if log.is_file() else []
    kept: list[dict[str, float]] = []
    for row in rows:
        now = row.get("epoch", math.inf)
        start = len(kept)
        while start and kept[start - 1].get("epoch", -math.inf) >= now:
            start -= 1
        # rows with the same epoch and other metrics are kept: an evaluation, or a summary
        again = (i for i, old in enumerate(kept[start:], start) if old["epoch"] > now or old.keys() == row.keys())
        del kept[next(again, len(kept)) :]
        kept.append(row)
    return kept


def check_step0(stage: Stage, first: dict[str, float]) -> None:
    """Check that the model equals its reference, by the metrics of the first step, which come before its update.

    DPO, KTO: log pi - log pi_ref = 0, so every reward is 0. GRPO, RLOO: KL(pi, pi_ref) = 0 where there is a reference
    (beta > 0), and no ratio to the sampling policy is clipped, because every ratio is 1.

    Raises:
        StepZero: a metric is not 0 within the stage's tolerance.
    """
    names = STEP0 if stage.command != "kto" else {name: text for name, text in STEP0.items() if name != "kl"}
    if stage.tolerance is None:
        return
    for name, meaning in names.items():
        value = first.get(name, 0.0)
        if not abs(value) <= stage.tolerance:
            raise StepZero(
                f"at the first step {name} is {value:g}, not 0 within {stage.tolerance:g}: {meaning} is not zero "
                "before the model has learned anything, so the stage compares its model with another one. Look at its "
                "reference, its adapters and its dropout; `step0_tolerance: NUMBER` in its settings moves the limit, "
                "`step0_tolerance: null` turns this check off"
            )


def execute(
    stage: Stage, words: list[str], fresh: bool, show: Callable[[dict[str, float]], None] = lambda row: None
) -> int:
    """Run `trl-qtarget` with `words` into the stage's log, and return its exit code.

    Args:
        fresh: whether the stage starts at its first step, which is then checked, and its log anew
        show: is called with each row of metrics

    Raises:
        StepZero: the stage was stopped after its first step.
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
                process.wait()  # it has ended or was stopped


def _rows(log: Path, start: int, process: subprocess.Popen) -> Iterator[dict[str, float]]:
    """Yield the metrics that a process writes into its log, until the process ends."""
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
    """End the processes that a killed chain left running in a stage's folder, and return their number."""
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
    """Return the last lines of a log, without progress bars and empty lines."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line.rstrip() for line in re.split(r"[\r\n]", text)]
    return [line for line in lines if line.strip() and not re.search(r"\d+%\|", line)][-number:]
