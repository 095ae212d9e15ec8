"""The quickstart's table and picture; run.py makes both."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table


LABELS = {
    "student": "student\nbefore",
    "nll": "SFT\n(nll)",
    "dft": "DFT\n(dft)",
    "target_sft": "Target-SFT\n(target_sft)",
    "teacher": "teacher",
}
COLORS = {"nll": "#7a9cc6", "dft": "#e0a458", "target_sft": "#6bb077"}  # everything else is grey


@dataclass(frozen=True)
class Score:
    """A line of the table: values in percent, one per seed; `seconds` is empty for models that were not trained."""

    average: list[float]
    greedy: list[float]
    pass_at_k: list[float]
    seconds: list[float]


def error(values: list[float]) -> float | None:
    """Standard error of the mean over seeds."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def mean_and_error(values: list[float], sign: str = "") -> str:
    """`64.1 +- 2.3`, or `64.1` for a single value."""
    spread = error(values)
    return f"{statistics.mean(values):{sign}.1f}" + (f" +- {spread:.1f}" if spread is not None else "")


def table(scores: dict[str, Score], k: int) -> Table:
    """The table of all scores."""
    out = Table("model", f"Average@{k}", "greedy", f"pass@{k}", "training", title="Unseen problems solved, in percent")
    for column in out.columns[1:]:
        column.justify = "right"
    for name, score in scores.items():
        cells = map(mean_and_error, (score.average, score.greedy, score.pass_at_k))
        out.add_row(name, *cells, f"{statistics.mean(score.seconds):.1f} s" if score.seconds else "")
    draws = len(scores["nll"].average)
    out.caption = f"+- standard error over {draws} draws of the demonstrations" if draws > 1 else "one draw: no errors"
    for loss in ("nll", "dft"):
        pairs = zip(scores["target_sft"].average, scores[loss].average, strict=True)
        out.caption += f"\nAverage@{k}, target_sft minus {loss}: {mean_and_error([a - b for a, b in pairs], '+')}"
    return out


def draw(scores: dict[str, Score], k: int, path: Path) -> None:
    """Average@k as bars with standard errors, greedy accuracy and pass@k as marks."""
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for x, (name, score) in enumerate(scores.items()):
        mean = statistics.mean(score.average)
        color = COLORS.get(name, "#c9c9c9")
        axes.bar(x, mean, 0.62, yerr=error(score.average), capsize=5, color=color, zorder=2)
        axes.text(x, mean / 2, f"{mean:.1f}", ha="center", va="center", weight="bold", fontsize=13, zorder=4)
        for values, marker, size, label in ((score.greedy, "D", 7, "greedy"), (score.pass_at_k, "_", 22, f"pass@{k}")):
            label = label if x == 0 else None
            axes.plot(x, statistics.mean(values), marker, color="#333333", ms=size, label=label, zorder=3)
    draws = len(scores["nll"].average)
    axes.set_title(
        "One small student, three losses, the same noisy demonstrations\n"
        f"200 rows, a fifth of them wrong; bars: Average@{k}, mean and standard error of {draws} draws",
        loc="left",
        fontsize=11,
    )
    axes.set_xticks(range(len(scores)), [LABELS[name] for name in scores])
    axes.set_ylabel("unseen problems solved (%)")
    axes.set_ylim(0, 105)
    axes.grid(axis="y", color="#e6e6e6", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=160)
    plt.close(figure)
