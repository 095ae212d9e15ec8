"""Time and memory of the fused loss beside other losses, and beside the matrix products that no loss can avoid.

    python -m benchmarks.kernel                # everything in benchmarks/README.md: the table, the curves, the figure
    python -m benchmarks.kernel --tokens 256 --vocab 32768 --only dft "TRL nll"

Contestants take turns, so that a slow spell of the machine falls on all; the tables show medians of the ratios within
a turn. Memory is the peak of a separate process, above its inputs. A contestant whose gradient is not that of the
specification is not timed. Results go to benchmarks/results/ as CSV, with hardware, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import plot
from benchmarks.contestants import CONTESTANTS, EXPECTED, Problem
from benchmarks.machine import forget_peak, keep_freed_memory, provenance, resident, save
from trl_qtarget import build, reference_loss


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GROWING = ["dft", "target_sft K=64", "target_sft dense", "TRL nll", "TRL divergence", "plain logits"]
console = Console()


@dataclass(frozen=True)
class Series:
    """Measurements that belong together: one table per size."""

    part: str
    tokens: list[int]
    vocab: list[int]
    names: list[str]
    turns: int
    memory: list[str] = field(default_factory=list)  # whose peak is measured
    keeps_memory: bool = True  # see machine.keep_freed_memory, which cannot be undone: series without it come first


def whole(names: list[str], turns: int, gpu: bool) -> list[Series]:
    """The series of benchmarks/README.md, in sizes that take some minutes on two cores or on one GPU."""
    growing = [name for name in GROWING if name in names]
    compared = [name for name in names if name in GROWING or name.endswith("products")]
    V = 151_936 if gpu else 147_456
    far = [name for name in growing if not name.startswith("TRL")]  # whose 8,192 tokens would take minutes here
    small, large = ([1024], [8192]) if gpu else ([256], [1024])
    backs = [] if gpu else [(small, turns), (large, 1)]
    return [
        *(Series("table, memory handed back", n, [V], compared, t, keeps_memory=False) for n, t in backs),
        Series("table", small, [V], names, turns),
        Series("table", large, [V], compared, turns - 1, growing),
        Series("memory", [2048], [V], [], 0, [x for x in ("dft", "target_sft dense", "plain logits") if x in names]),
        Series("tokens", [256, 1024], [32_768], growing, turns, growing),
        Series("tokens", [4096], [32_768], growing, 1, [*far, *(name for name in growing if name == "TRL nll")]),
        Series("tokens", [8192], [32_768], growing if gpu else far, 1, growing if gpu else far),
        Series("vocabulary", [256], [32_768, 65_536, 131_072, 262_144], growing, turns - 1),
    ]


def gate(name: str, args: argparse.Namespace) -> str | None:
    """Return why a contestant is not timed: it cannot run here, or its gradient is wrong. None if it may be timed."""
    p = Problem.draw(48, 2048, 64, 96, DTYPES[args.dtype], args.device)
    try:
        CONTESTANTS[name](p)()
    except Exception as reason:  # another package's kernel may fail here in any way
        return f"{type(reason).__name__}: {reason}"
    if name not in EXPECTED:
        return None
    loss, teacher = EXPECTED[name]
    given = p.hidden, p.weight
    exact = [x.detach().double().requires_grad_() for x in given]
    logits = exact[0] @ exact[1].T
    reference_loss(logits, p.labels, build(loss), p.teacher_logits(teacher, logits.detach())).backward()
    errors = [
        ((x.grad.double() - e.grad).abs().max() / e.grad.abs().max()).item() for x, e in zip(given, exact, strict=True)
    ]
    error = max(errors)
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


def times(names: list[str], n: int, V: int, turns: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each contestant, turn by turn; the first turn warms up and does not count."""
    p = Problem.draw(n, V, args.width, args.teacher_width, DTYPES[args.dtype], args.device)
    runs = {name: CONTESTANTS[name](p) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in track(range(turns + 1), f"{n} tokens, {V} columns", console=console, transient=True):
        for name, run in runs.items():
            elapsed = once(run, p)
            if turn:
                seconds[name].append(elapsed)
    return seconds


def peak(name: str, n: int, V: int, args: argparse.Namespace) -> int:
    """MiB above the inputs, measured in a separate process."""
    words = ["--measure", name, "--tokens", str(n), "--vocab", str(V), "--device", args.device, "--dtype", args.dtype]
    widths = ["--width", str(args.width), "--teacher_width", str(args.teacher_width)]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel", *words, *widths], capture_output=True, text=True, check=True
    )
    return round(float(run.stdout.split()[-1]))


def measure_peak(name: str, n: int, V: int, args: argparse.Namespace) -> float:
    p = Problem.draw(n, V, args.width, args.teacher_width, DTYPES[args.dtype], args.device)
    run = CONTESTANTS[name](p)
    if p.hidden.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    forget_peak()
    before = resident("VmRSS")
    run()
    return (resident("VmHWM") - before) / 2**10


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float | str:
    """Median over the turns, or an empty text where one of the two did not run."""
    if not seconds.get(name) or not seconds.get(base):
        return ""
    return round(statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True)), 3)


def compare(series: Series, n: int, V: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One table: time as ratios to the products and to TRL's, and peak memory."""
    if series.keeps_memory:
        keep_freed_memory()
    seconds = times(series.names, n, V, series.turns, args) if series.names else {}
    with ThreadPoolExecutor(2) as pool:
        measured = series.memory if args.memory else []
        peaks = dict(zip(measured, pool.map(lambda name: peak(name, n, V, args), measured), strict=True))
    rows: list[dict[str, Any]] = []
    for name in seconds or peaks:
        taught = "dense" in name or name in ("4 products", "TRL divergence", "Liger JSD")
        floor, trl = ("4 products", "TRL divergence") if taught else ("3 products", "TRL nll")
        rows.append({
            "part": series.part, "loss": name, "tokens": n, "vocab": V,
            "width": args.width, "teacher_width": args.teacher_width,
            "ms": round(statistics.median(seconds[name]) * 1e3, 2) if name in seconds else "",
            "to_products": ratio(seconds, name, floor), "to_trl": ratio(seconds, name, trl),
            "to_dft": ratio(seconds, name, "dft"), "peak_mib": peaks.get(name, ""),
        })  # fmt: skip
    shown = ("loss", "ms", "to_products", "to_trl", "to_dft", "peak_mib")
    table = Table(
        "loss", "ms", "/ its products", "/ TRL's", "/ dft", "peak MiB", title=f"{series.part}: {n} tokens, {V} columns"
    )
    for row in rows:
        table.add_row(*(str(row[key]) for key in shown))
    console.print(table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", help="only these sizes, instead of everything")
    parser.add_argument("--vocab", type=int, nargs="+", default=[147456], help="with --tokens: columns")
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--teacher_width", type=int, default=960)
    parser.add_argument("--turns", type=int, default=3, help="of the small sizes, at least 2")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--no_memory", dest="memory", action="store_false", help="time only")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the child process of `peak`
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("No GPU is visible here: --device cpu measures this machine's processor.")
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
    facts = provenance(args.device, args.dtype)
    console.print(json.dumps(facts), style="dim")
    chosen = whole(names, args.turns, args.device == "cuda")
    if args.tokens:
        chosen = [Series("table", args.tokens, args.vocab, names, args.turns, names)]
    rows: list[dict[str, Any]] = []
    for series in chosen:
        rows += [row for V in series.vocab for n in series.tokens for row in compare(series, n, V, args)]
        if not args.tokens:  # after each series, so that an interrupted run keeps its results
            path = save(f"kernel_{args.device}", rows, facts)
    if not args.tokens:
        console.print(f"Written to {path} and {plot.growth(path)}.")


if __name__ == "__main__":
    main()
