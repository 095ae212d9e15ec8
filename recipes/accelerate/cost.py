"""Cost of a step as devices are added: memory as `trl-qtarget plan` counts it, the rest by the formulas of README.md.

Writes the tables of README.md. Nothing here is measured.
"""

import re
from itertools import product
from pathlib import Path

from trl_qtarget.planning.memory import parts, peak, totals
from trl_qtarget.planning.run import Engine, Run, Size, Teacher


README = Path(__file__).with_name("README.md")
TABLES = re.compile(r"(<!-- cost:[^\n]*-->\n).*(<!-- /cost -->)", re.DOTALL)
G = 1e9
V = 152_064
ENGINES = {"ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP"}  # profile, and its name in the plan


def qwen(width: int, layers: int, inner: int, heads: int, kv_heads: int, rows: int = V, itemsize: int = 2) -> Size:
    """Sizes of a Qwen2.5 with a head of its own, from the numbers of its configuration."""
    D, kv = width, width // heads * kv_heads
    linear = layers * (2 * D * D + 2 * D * kv + 3 * D * inner)
    biases_and_norms = layers * (D + 2 * kv + 2 * D) + D
    return Size(
        frozen=0, trained=2 * rows * D + linear + biases_and_norms, linear=linear, rows=rows, width=D, layers=layers,
        inner=4 * D + 2 * kv + 4 * inner, frozen_bytes=0, itemsize=itemsize,
    )  # fmt: skip


STUDENT, TEACHER = qwen(3584, 28, 18_944, 28, 4, itemsize=4), qwen(5120, 64, 27_648, 40, 8)  # Qwen2.5-7B and -32B
TOKENS = 2**20  # of a step, over all devices
ROWS, ROW_TOKENS = 4, 4096  # of one device at a time
MICRO = ROWS * ROW_TOKENS  # t
SPEED = 0.4 * 989e12  # FLOP/s of a device: 40% of an H100's bfloat16 peak
NODE, NETWORK = 400 * G, 50 * G  # bytes/s of a device, within eight of them and beyond
K = 64
GPU_HOUR, GB_MONTH = 2.0, 0.02  # prices


def micro_batches(devices: int) -> int:
    return TOKENS // (devices * MICRO)


def traffic(devices: int, engine: str, teacher: bool) -> float:
    """Bytes that a device sends in a step."""
    n, times, share = STUDENT.parameters, micro_batches(devices), (devices - 1) / devices
    taught = 2 * TEACHER.parameters if teacher else 0
    sent = {
        "ddp": 8 * n,
        "zero2": (times + 1) * 2 * n,
        "zero3": times * (6 * n + taught),
        "fsdp2": times * (4 * n + taught) + 2 * n,
    }
    return sent[engine] * share


def run(devices: int, engine: str, teacher: bool) -> Run:
    """The run that `trl-qtarget plan` would count for such a recipe."""
    within = Teacher(TEACHER, 2 * TEACHER.parameters, itemsize=2) if teacher else None
    return Run(
        STUDENT, ROWS, ROW_TOKENS, Engine(ENGINES[engine], devices), micro_batches(devices), teacher=within,
        cached_ids=0 if teacher else K,
    )  # fmt: skip


def seconds(devices: int, engine: str, teacher: bool) -> tuple[float, float]:
    """Seconds that a step spends on matrix products, and on sending."""
    flops = 8 * STUDENT.parameters + (2 * TEACHER.parameters if teacher else 0)
    rate = NODE if devices <= 8 else NETWORK
    return flops * TOKENS / devices / SPEED, traffic(devices, engine, teacher) / rate


def of_parts(devices: int) -> list[str]:
    """Everything that a device holds at its peak, engine by engine."""
    found = []
    for engine in ENGINES:
        planned = run(devices, engine, teacher=False)
        bytes_at = totals(planned)
        moment = max(bytes_at, key=lambda name: bytes_at[name])
        held = {part.name: getattr(part, moment) for part in parts(planned)}
        found.append({**held, "together": bytes_at[moment]})
    names = list(dict.fromkeys(name for held in found for name in held if name != "together"))
    rows = [f"| GB on each of {devices}, teacher cached | {' | '.join(ENGINES)} |", "|---|" + "---|" * len(ENGINES)]
    for name in [*names, "together"]:
        rows.append(f"| {name} | " + " | ".join(f"{held.get(name, 0) / G:.1f}" for held in found) + " |")
    return rows


def tables() -> str:
    rows = [*of_parts(8), ""]
    rows += ["| devices | engine | teacher | memory a device | sent a device and step | products | sending |"]
    rows.append("|---|---|---|---|---|---|---|")
    for devices in (8, 16, 32, 64):
        for engine, teacher in product(("zero3", "fsdp2", "zero2"), (True, False)):
            compute, sending = seconds(devices, engine, teacher)
            where = "in process" if teacher else "cached"
            held, sent = peak(run(devices, engine, teacher)) / G, traffic(devices, engine, teacher) / G
            sizes, times = f"{held:.0f} GB | {sent:.0f} GB", f"{compute:.1f} s | {sending:.1f} s"
            rows.append(f"| {devices} | {engine} | {where} | {sizes} | {times} |")
    label = 6 * K + 12
    scoring = 2 * TEACHER.parameters / SPEED * GPU_HOUR / 3600
    storing = label / G * GB_MONTH
    rows += ["", "| of one label at K = 64 | |", "|---|---|"]
    rows.append(f"| stored | {label} bytes: {label} GB for a billion labels |")
    rows.append(f"| read in a step of {MICRO:,} labels a device | {label * MICRO / 1e6:.1f} MB |")
    rows.append(f"| the teacher's pass, once | {scoring * 1e9:.0f} nano-dollars |")
    rows.append(f"| a month on disk | {storing * 1e9:.0f} nano-dollars |")
    rows.append(f"| months on disk that one spared pass pays for | {scoring / storing:.0f} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    README.write_text(TABLES.sub(lambda block: block[1] + tables() + block[2], README.read_text()))
