"""A chain of two made-up stages that is killed between any two operations on files: `chain_victim.py FOLDER`.

The command of a stage is replaced by one that trains three steps, which it writes down one after the other, with a
checkpoint after each. For each moment a process is forked that kills itself there, and a second one that goes on. It
prints how many moments there were. Nothing here imports torch or TRL.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console

from trl_qtarget.chain import execute, run
from trl_qtarget.chain.keys import is_done, is_foreign
from trl_qtarget.chain.plan import Stage


STEPS = 3
WEIGHTS = "model.safetensors"
READY = SimpleNamespace(settings={"max_steps": STEPS}, words=[], unchecked="")


def stages(folder: Path) -> list[Stage]:
    return [Stage(name, "sft", folder / name, {}) for name in ("one", "two")]


def trained(steps: int = STEPS) -> str:
    """The weights after so many steps: a step that is left out or taken twice changes them."""
    return " ".join(map(str, range(1, steps + 1)))


def train(stage: Stage, words: list[str], fresh: bool, show) -> int:
    """Train, in place of `execute.execute`, and keep one checkpoint, as with save_total_limit: 1."""
    start = Path(words[-1]) if not fresh else None
    steps = [] if start is None else (start / WEIGHTS).read_text().split()
    write(stage.output / "README.md", "a start")
    while len(steps) < STEPS:
        steps.append(str(len(steps) + 1))
        save(stage.output, steps)
    write(stage.output / "config.json", "{}")
    write(stage.output / WEIGHTS, " ".join(steps))
    return 0


def save(output: Path, steps: list[str]) -> None:
    checkpoint = output / f"checkpoint-{len(steps)}"
    write(checkpoint / WEIGHTS, " ".join(steps))
    write(checkpoint / "optimizer.pt", "moments")
    write(checkpoint / "trainer_state.json", json.dumps({"global_step": len(steps), "max_steps": STEPS}))
    old = output / f"checkpoint-{len(steps) - 1}"
    for file in sorted(old.glob("*")):  # the weights before the state, which makes half a checkpoint look complete
        file.unlink()
    shutil.rmtree(old, ignore_errors=True)


def write(file: Path, text: str) -> None:
    """Write a file in two parts, so that a kill between them leaves half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as opened:
        for part in (text[: len(text) // 2], text[len(text) // 2 :]):
            opened.write(part)
            opened.flush()
            os.sync()  # a moment: `stop_at` counts it


# Processes


MOMENTS = ("fsync", "sync", "replace", "rename", "unlink", "mkdir", "rmdir")  # functions of `os`


def stop_at(moment: int) -> None:
    """Kill this process before its call number `moment` of the functions in `MOMENTS`."""
    calls = []

    def counted(call):
        def counting(*args, **kwargs):
            calls.append(call)
            if len(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counting

    os.fsync = os.sync = lambda *_: None  # waiting for a disk shows nothing here
    for name in MOMENTS:
        setattr(os, name, counted(getattr(os, name)))


def run_chain(folder: Path, key: str) -> None:
    execute.execute = train
    execute.end_orphans, run._versions = lambda folder: 0, dict  # they take long
    console = Console(quiet=True)
    with run._locked(folder, False):
        for stage in stages(folder):
            assert not is_foreign(stage), f"{stage.folder} is no stage of a chain"
            failure = [] if is_done(stage, key) else run.run_stage(stage, key, READY, False, console)
            assert not failure, failure


def in_a_process(folder: Path, key: str, moment: int = 0) -> bool:
    """Run the chain in a forked process; return whether it came to its end."""
    child = os.fork()
    if not child:
        stop_at(moment)
        try:
            run_chain(folder, key)
        except BaseException as mistake:
            print(f"{moment}: {type(mistake).__name__}: {mistake}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended in (0, -signal.SIGKILL), f"moment {moment}"
    return ended == 0


def check(folder: Path, key: str) -> int:
    """Check that every stage that counts as done is whole, and return their number."""
    done = [stage for stage in stages(folder) if is_done(stage, key)]
    for stage in done:
        assert (stage.output / WEIGHTS).read_text() == trained()
        assert (stage.output / "config.json").read_text() == "{}"
    return len(done)


def kill_at_moments(folder: Path, before: bool) -> int:
    """Kill a chain at every other moment, and return the last; `before`: it replaces the stages of another key."""
    start, moment, ended = folder / "start", int(before) - 1, False
    start.mkdir(parents=True)
    if before:
        in_a_process(start, "old")
    while not ended:
        moment += 2
        copy = Path(shutil.copytree(start, folder / str(moment)))
        ended = in_a_process(copy, "new", moment)
        check(copy, "new")
        assert in_a_process(copy, "new"), f"after moment {moment}"
        assert check(copy, "new") == 2
        assert {path.name for path in copy.glob("*.old-*")} == ({"one.old-1", "two.old-1"} if before else set())
        shutil.rmtree(copy)
    return moment


if __name__ == "__main__":
    print(*(kill_at_moments(Path(sys.argv[1], name), name == "again") for name in ("first", "again")))
