"""Run a script of this package under accelerate's launcher, as `trl` does, and return how it ended."""

import argparse
import logging
import signal
import subprocess
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from .. import compat
from .parsing import SCRIPT, fail


def make_launcher() -> argparse.ArgumentParser:
    """Make the parser of `accelerate launch`, and add TRL's `--accelerate_config`."""
    parser = compat.launch_parser()
    parser.add_argument("--accelerate_config", dest="config_file", type=_accelerate_config)
    return parser


def accelerate_configs() -> list[str]:
    """List the profiles of TRL that `--accelerate_config` takes by name; other values are files."""
    return sorted(compat.accelerate_profiles())


def _accelerate_config(name: str) -> str:
    """Return the path of a profile that is given as a file or by TRL's name for it."""
    if Path(name).is_file():
        return name
    if name in accelerate_configs():
        return compat.accelerate_profiles()[name]
    raise argparse.ArgumentTypeError(f"{name!r} is neither a file nor one of {', '.join(accelerate_configs())}")


def launched_as(options: list[str]) -> argparse.Namespace:
    """Return the settings that `accelerate launch` derives from its options, its configuration file and the machine.

    Raises:
        ValueError: two options contradict each other.
    """
    logging.getLogger(compat.ACCELERATE_LAUNCH).addFilter(_is_news)
    return compat.launch_settings(make_launcher().parse_args([*options, SCRIPT]))


def launch(module: str, own: list[str], options: list[str], prog: str) -> int:
    """Run `module` with the words `own` under `accelerate launch` with `options`, and return its exit code.

    The module prints its own errors. The launcher's traceback, which would hide them, is not printed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # --module: a script that is run by its path puts its folder first on sys.path, where its neighbours shadow modules
    # of the same names
    args = make_launcher().parse_args([*options, "--module", module, *own])
    logging.getLogger(compat.ACCELERATE_LAUNCH).addFilter(_is_news)
    try:
        with children_stopped():
            compat.run_launch(args)
        return 0
    except subprocess.CalledProcessError as ended:
        code = ended.returncode
    except ChildFailedError as ended:
        code = ended.get_first_failure()[1].exitcode
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except SignalException as ended:
        code = 128 + ended.sigval
    except Exception as mistake:  # about accelerate's options or their file: the module itself runs in a child
        kind = "" if isinstance(mistake, ValueError | RuntimeError | OSError | ImportError) else type(mistake).__name__
        fail(prog, f"accelerate launch: {kind}: {mistake}" if kind else mistake)
    return code if code >= 0 else 128 - code


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a log record is shown: accelerate's list of default values is hidden, unless it found several GPUs."""
    message = record.getMessage()
    return not message.startswith("The following values were not passed") or "More than one GPU" in message


@contextmanager
def children_stopped():
    """Terminate the processes started in the block when it ends, fails, is interrupted or is terminated."""

    def terminate(number, frame):
        raise SystemExit(128 + number)

    in_main_thread = threading.current_thread() is threading.main_thread()
    others = set(psutil.Process().children(recursive=True))
    previous = signal.signal(signal.SIGTERM, terminate) if in_main_thread else None
    try:
        yield
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)
        alive = set(psutil.Process().children(recursive=True)) - others
        _, alive = psutil.wait_procs(alive, timeout=3)  # Ctrl-C reaches the children too, and they end by themselves
        for end, patience in ((psutil.Process.terminate, 30), (psutil.Process.kill, 3)):
            for process in alive:
                with suppress(psutil.NoSuchProcess):
                    end(process)
            _, alive = psutil.wait_procs(alive, timeout=patience)
