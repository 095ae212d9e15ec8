"""Time and memory of the fused loss beside others', and beside the matrix products that nobody can avoid.

    python -m benchmarks.kernel                     # the sizes of the table in benchmarks/README.md
    python -m benchmarks.kernel --tokens 256 --vocab 32768 --only dft "TRL nll"

Contestants take turns, so that a slow spell of the machine falls on all; what is printed are medians of the ratios
within a turn. Memory is the peak of a process of its own, above its inputs. No contestant is timed whose gradient is
not the specified one. Results go to benchmarks/results/ as CSV, with hardware, versions and commit.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.contestants import CONTESTANTS, EXPECTED, Problem
from trl_qtarget import build, reference_loss


RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
console = Console()


def gate(name: str, args: argparse.Namespace) -> str | None:
    """Why a contestant is not timed: it cannot run here, or its gradient is wrong. None if it may run."""
    p = Problem.draw(48, 2048, 64, 96, DTYPES[args.dtype], args.device)
    try:
        CONTESTANTS[name](p)()
    except ImportError as reason:
        return str(reason)
    if name not in EXPECTED:
        return None
    loss, teacher = EXPECTED[name]
    got = p.hidden.grad.double()
    hidden = p.hidden.detach().double().requires_grad_()
    taught = p.teacher_hidden.double() @ p.teacher_weight.double().T if teacher else None
    reference_loss(hidden @ p.weight.detach().double().T, p.labels, build(loss), taught).backward()
    error = ((got - hidden.grad).abs().max() / hidden.grad.abs().max()).item()
    allowed = 1e-4 if args.dtype == "float32" else 3e-2
    return None if error <= allowed else f"its gradient is off by {error:.1e}"


def once(run, problem: Problem) -> float:
    """Seconds of one forward and backward pass."""
    problem.clear()
    if problem.hidden.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if problem.hidden.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def times(names: list[str], n: int, V: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each contestant, turn by turn; the first turn warms up and does not count."""
    p = Problem.draw(n, V, args.width, args.teacher_width, DTYPES[args.dtype], args.device)
    runs = {name: CONTESTANTS[name](p) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in track(range(args.turns + 1), f"{n} tokens, {V} columns", console=console, transient=True):
        for name, run in runs.items():
            elapsed = once(run, p)
            if turn:
                seconds[name].append(elapsed)
    return seconds


def peak(name: str, n: int, V: int, args: argparse.Namespace) -> float:
    """MiB above the inputs, in a process of its own."""
    words = ["--measure", name, "--tokens", str(n), "--vocab", str(V), "--device", args.device, "--dtype", args.dtype]
    widths = ["--width", str(args.width), "--teacher_width", str(args.teacher_width)]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel", *words, *widths], capture_output=True, text=True, check=True
    )
    return float(run.stdout.split()[-1])


def measure_peak(name: str, n: int, V: int, args: argparse.Namespace) -> float:
    p = Problem.draw(n, V, args.width, args.teacher_width, DTYPES[args.dtype], args.device)
    run = CONTESTANTS[name](p)
    if p.hidden.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    run()
    return (resident("VmHWM") - before) / 2**10


def resident(field: str) -> int:
    """KiB, from the kernel's own account of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), ":unknown")
    return f"{cpu.partition(':')[2].strip()}, {torch.get_num_threads()} threads"


def provenance(args: argparse.Namespace) -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "hardware": hardware(args.device), "dtype": args.dtype, "torch": torch.__version__, "trl": version("trl"),
        "python": platform.python_version(), "commit": commit, "date": date.today().isoformat(),
    }  # fmt: skip


def compare(n: int, V: int, names: list[str], args: argparse.Namespace) -> list[dict]:
    """One table: time as ratios to the products, and peak memory."""
    seconds = times(names, n, V, args)
    rows = []
    table = Table("loss", "ms", "/ its products", "/ TRL's", "peak MiB", title=f"{n} tokens, {V} columns")
    for name in names:
        taught = "dense" in name or name in ("4 products", "TRL divergence")
        floor, trl = ("4 products", "TRL divergence") if taught else ("3 products", "TRL nll")
        row = {
            "loss": name, "tokens": n, "vocab": V, "width": args.width, "teacher_width": args.teacher_width,
            "ms": round(statistics.median(seconds[name]) * 1e3, 2),
            "to_products": round(ratio(seconds, name, floor), 3) if floor in seconds else "",
            "to_trl": round(ratio(seconds, name, trl), 3) if trl in seconds else "",
            "peak_mib": round(peak(name, n, V, args)) if args.memory else "",
        }  # fmt: skip
        rows.append(row)
        table.add_row(*(str(row[key]) for key in ("loss", "ms", "to_products", "to_trl", "peak_mib")))
    console.print(table)
    return rows


def save(rows: list[dict], args: argparse.Namespace) -> Path:
    RESULTS.mkdir(exist_ok=True)
    facts = provenance(args)
    path = RESULTS / f"kernel_{args.device}_{facts['date']}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts])
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--vocab", type=int, nargs="+", default=[147456])
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--teacher_width", type=int, default=960)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--no_memory", dest="memory", action="store_false", help="time only")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the child process of `peak`
    args = parser.parse_args()
    if args.measure:
        print(measure_peak(args.measure, args.tokens[0], args.vocab[0], args))
        return
    names = []
    for name in args.only:
        reason = gate(name, args)
        if reason is None:
            names.append(name)
        else:
            console.print(f"not timed: {name}, {reason}")
    console.print(json.dumps(provenance(args)), style="dim")
    rows = [row for V in args.vocab for n in args.tokens for row in compare(n, V, names, args)]
    console.print(f"Written to {save(rows, args)}.")


if __name__ == "__main__":
    main()
