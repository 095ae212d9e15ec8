"""Draw a results file again, without measuring again:  python -m benchmarks.plot benchmarks/results/kernel_....csv"""

from __future__ import annotations

import csv
import sys
from pathlib import Path


# One hue a family: ours blue, TRL's orange, plain logits grey; dashed with a dense teacher
STYLES = {
    "dft": ("#1f6feb", "-"), "target_sft K=64": ("#79b8ff", "-"), "target_sft dense": ("#1f6feb", "--"),
    "TRL nll": ("#d9730d", "-"), "TRL divergence": ("#d9730d", "--"), "plain logits": ("#8b949e", "-"),
}  # fmt: skip


def growth(path: Path) -> Path:
    """Time a token and peak memory against tokens, and time a token against columns, as a PNG beside the CSV."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    panels = [
        ("tokens", "tokens", "time a token, ms", lambda r: float(r["ms"]) / int(r["tokens"])),
        ("tokens", "tokens", "peak memory above the inputs, GiB", lambda r: float(r["peak_mib"]) / 1024),
        ("vocabulary", "vocab", "time a token, ms", lambda r: float(r["ms"]) / int(r["tokens"])),
    ]
    for axis, (part, x, label, y) in zip(axes, panels, strict=True):
        for name, (colour, dash) in STYLES.items():
            mine = [row for row in rows if row["part"] == part and row["loss"] == name]
            axis.plot([int(r[x]) for r in mine], [y(r) for r in mine], dash, color=colour, marker=".", label=name)
        axis.set(xlabel={"tokens": "labelled tokens", "vocab": "vocabulary"}[x], ylabel=label)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k")
        axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    first = rows[0]
    figure.suptitle(f"{first['hardware']}, {first['dtype']}, {first['date']}", fontsize=9, color="#57606a")
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=140)
    pyplot.close(figure)
    return target


if __name__ == "__main__":
    for word in sys.argv[1:]:
        print(growth(Path(word)))
