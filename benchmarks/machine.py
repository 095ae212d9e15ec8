"""The facts that every benchmark records of its machine, and the memory of a process."""

from __future__ import annotations

import csv
import ctypes
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


RESULTS = Path(__file__).parent / "results"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of handing it back to the system, as the allocators of GPUs do.

    Otherwise every contestant pays for fresh pages, now more and now less: on a shared machine they may cost as much
    as a matrix product.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def resident(field: str) -> int:
    """KiB, from the kernel's own account of this process: VmRSS now, VmHWM at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), ":unknown")
    return f"{cpu.partition(':')[2].strip()}, {torch.get_num_threads()} threads"


def provenance(device: str = "cpu", dtype: str = "float32") -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "hardware": hardware(device), "dtype": dtype, "torch": torch.__version__, "trl": version("trl"),
        "python": platform.python_version(), "commit": commit, "date": date.today().isoformat(),
    }  # fmt: skip


def save(name: str, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, str]) -> Path:
    """Write rows, each with the facts of the machine, to results/NAME_DATE.csv."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}_{facts['date']}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts])
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)
    return path
