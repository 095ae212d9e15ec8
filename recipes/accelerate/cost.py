"""What a step costs as devices are added, by the formulas of README.md, whose tables this writes.

Nothing here is measured.
"""

import re
from dataclasses import dataclass
from pathlib import Path


README = Path(__file__).with_name("README.md")
TABLES = re.compile(r"(<!-- cost:[^\n]*-->\n).*(<!-- /cost -->)", re.DOTALL)
G = 1e9


@dataclass(frozen=True)
class Model:
    parameters: float  # N
    width: int  # D
    layers: int  # L
    vocabulary: int = 152_064  # V

    @property
    def head(self) -> int:
        return self.vocabulary * self.width


STUDENT, TEACHER = Model(7.6e9, 3584, 28), Model(32.8e9, 5120, 64)  # Qwen2.5-7B and -32B
TOKENS = 2**20  # of a step, over all devices
MICRO = 2**14  # of one device at a time, t
SPEED = 0.4 * 989e12  # FLOP/s of a device: 40% of an H100's bfloat16 peak
NODE, NETWORK = 400 * G, 50 * G  # bytes/s of a device, within eight of them and beyond
K = 64
GPU_HOUR, GB_MONTH = 2.0, 0.02  # prices


def traffic(devices: int, engine: str, teacher: bool) -> float:
    """Bytes that a device sends in a step."""
    share, micro_batches = (devices - 1) / devices, TOKENS / (devices * MICRO)
    if engine == "zero2":
        return (micro_batches + 1) * 2 * STUDENT.parameters * share
    return micro_batches * (6 * STUDENT.parameters + (2 * TEACHER.parameters if teacher else 0)) * share


def memory(devices: int, engine: str, teacher: bool) -> float:
    """Bytes that a device holds at its peak."""
    n = STUDENT.parameters
    states = 16 * n / devices if engine == "zero3" else 2 * n + 14 * n / devices
    activations = (2 * STUDENT.layers + 34) * MICRO * STUDENT.width
    whole = (4 + (2 if engine == "zero3" else 0)) * STUDENT.head
    other = 0.0
    if teacher:
        other = 2 * TEACHER.parameters / devices + 2 * TEACHER.head if engine == "zero3" else 2 * TEACHER.parameters
    return states + activations + whole + other


def seconds(devices: int, engine: str, teacher: bool) -> tuple[float, float]:
    """Of a step: spent on products, and on sending."""
    flops = 8 * STUDENT.parameters + (2 * TEACHER.parameters if teacher else 0)
    rate = NODE if devices <= 8 else NETWORK
    return flops * TOKENS / devices / SPEED, traffic(devices, engine, teacher) / rate


def tables() -> str:
    rows = ["| devices | engine | teacher | memory a device | sent a device and step | products | sending |"]
    rows.append("|---|---|---|---|---|---|---|")
    for devices in (8, 16, 32, 64):
        for engine, teacher in (("zero3", True), ("zero3", False), ("zero2", True), ("zero2", False)):
            compute, sending = seconds(devices, engine, teacher)
            where = "in process" if teacher else "cached"
            held, sent = memory(devices, engine, teacher) / G, traffic(devices, engine, teacher) / G
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
