"""The results of a chain: a table, and one self-contained HTML page with the curves of each stage."""

import json
import shlex
from collections import defaultdict
from html import escape
from pathlib import Path
from typing import Any

from ..evaluation.report import with_error
from ..files import write_text
from .execute import history
from .keys import Record
from .plan import Stage


MAIN_METRICS = {  # of a command's metrics the first that its log has
    "sft": ("nll", "loss"),
    "dpo": ("rewards/margins", "loss"),
    "kto": ("rewards/margins", "loss"),
    "grpo": ("reward",),
    "rloo": ("reward",),
    "reward": ("accuracy", "loss"),
    "merge": ("logit_difference",),
}
COLUMNS = ("stage", "command", "seconds", "metric", "output")
CURVES = ("loss", "nll", "reward", "kl", "rewards/margins", "rewards/accuracies", "accuracy", "entropy", "grad_norm")
WIDTH, HEIGHT, MARGIN = 320, 140, 8
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2rem 1rem .2rem 0;text-align:left}"
    "figure{display:inline-block;width:320px;vertical-align:top;margin:.5rem 1rem .5rem 0}svg{background:#f6f6f6}"
    "polyline{fill:none;stroke:#2563a8;stroke-width:1.5}figcaption{font-size:13px;color:#555}"
)


def main_metric(stage: Stage) -> str:
    """Return the last value of a stage's main metric as text; of an evaluation the Average@k of each model."""
    if stage.command == "eval":
        return _average(stage.output / "results.json")
    rows = history(stage.log)
    for name in MAIN_METRICS.get(stage.command, ()):
        values = [row[name] for row in rows if name in row]
        if values:
            return f"{name} {values[-1]:.4g}"
    return ""


def _average(file: Path) -> str:
    """Return the Average@k of each model in an evaluation's results, "" if there are no readable results."""
    try:
        results = json.loads(file.read_text(encoding="utf-8"))["results"]
        averages = [with_error(result["average_at_k"], result["average_at_k_se"]) for result in results]
        return f"Average@{results[0]['k']} {', '.join(averages)}"
    except (OSError, ValueError, LookupError):
        return ""


def table(stages: list[Stage], records: dict[str, Record], done: set[str]) -> Any:
    """Return the summary of a run."""
    from rich.table import Table

    out = Table(*COLUMNS, "", box=None, pad_edge=False)
    for stage in stages:
        note = "done before" if stage.name in done else "resumed" if records[stage.name].attempts > 1 else ""
        out.add_row(*_row(stage, records[stage.name]), note)
    return out


def _row(stage: Stage, record: Record) -> tuple[str, ...]:
    return stage.name, stage.command, f"{record.seconds:.0f}", record.metric, str(stage.output)


def write_page(folder: Path, stages: list[Stage], records: dict[str, Record]) -> Path:
    """Write `chain.html` into the chain's folder, and return its path."""
    rows = [_row(stage, records[stage.name]) for stage in stages]
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    parts = "".join(_section(stage, records[stage.name]) for stage in stages)
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(str(folder))}</title>'
        f"<style>{STYLE}</style><h1>{escape(str(folder))}</h1><table><tr>{head}</tr>{cells}</table>{parts}</html>\n"
    )
    file = folder / "chain.html"
    write_text(file, text)
    return file


def _section(stage: Stage, record: Record) -> str:
    """Return the part of the page for one stage: its command line, and a curve of each metric."""
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for number, row in enumerate(history(stage.log)):
        for name, value in row.items():
            if name in CURVES or name.startswith(("qtarget/", "eval_loss")):
                curves[name].append((row.get("epoch", float(number)), value))
    drawn = "".join(_curve(name, points) for name, points in curves.items() if len(points) > 1)
    command = shlex.join([*stage.command_line, *record.words])
    return f"<h2>{escape(stage.name)}</h2><p><code>{escape(command)}</code></p>{drawn}"


def _curve(name: str, points: list[tuple[float, float]]) -> str:
    """Return the curve of one metric over epochs as SVG, with its range as text."""
    points = [(x, y) for x, y in points if y == y and abs(y) != float("inf")]
    if not points:
        return ""
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))

    def place(value: float, start: float, end: float, size: int) -> float:
        return MARGIN + (size - 2 * MARGIN) * ((value - start) / (end - start) if end > start else 0.5)

    line = " ".join(
        f"{place(x, left, right, WIDTH):.1f},{HEIGHT - place(y, low, high, HEIGHT):.1f}" for x, y in points
    )
    ends = f"{points[0][1]:.4g} to {points[-1][1]:.4g}, between {low:.4g} and {high:.4g}"
    text = f"{name}: {ends}; epoch {left:g} to {right:g}"
    return (
        f'<figure><svg width="{WIDTH}" height="{HEIGHT}"><polyline points="{line}"/></svg>'
        f"<figcaption>{escape(text)}</figcaption></figure>"
    )
