"""Does the loss chosen for SFT leave a better start for GRPO and DPO? On the tiny model of recipes/quickstart.

    python -m benchmarks.chains                    # make chains: both recipes, about an hour on one core
    python -m benchmarks.chains --methods grpo     # goes on where it was interrupted

The chains of recipes/sft-then-grpo and recipes/sft-then-dpo run with each loss first and with no SFT at all. All
starts get the same number of updates. GRPO and DPO have the learning rate that was best for their start in Average@16,
on validation problems and a draw of the demonstrations that the comparison does not use. Every draw of the comparison
redraws demonstrations and practice problems. The chains run as `trl-qtarget chain` runs them, all stages in one
process.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import yaml


METHODS = {"grpo": Path("recipes/sft-then-grpo/chain.yaml"), "dpo": Path("recipes/sft-then-dpo/chain.yaml")}
QUICKSTART, DATA = Path("recipes/quickstart"), "runs/quickstart-data"
STUDENT = str(QUICKSTART / "student")
STARTS = ("nll", "dft", "target_sft", "none")
OF_THE_LOSS = ("loss", "loss_kwargs", "teacher_model_name_or_path", "learning_rate")
DRAWS, CHOICE_DRAWS = (0, 1, 2), (100,)  # seeds of task.py
RATES = {"grpo": (1e-4, 3e-4, 1e-3), "dpo": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)}
CURVES = {
    "grpo": ("reward", "mean reward: share of completions right", "GRPO updates"),
    "dpo": ("rewards/margins", "margin of the implicit rewards (beta x nats)", "DPO updates"),
}
ALIKE = "frac_reward_zero_std"  # GRPO's share of problems whose completions all have one reward: nothing to learn from
LOGGED = {"grpo": ("reward", "entropy", ALIKE), "dpo": ("rewards/margins", "entropy")}
SCORES = {"average_at_k": "Average@16", "greedy": "greedy", "pass_at_k": "pass@16"}

Rates = dict[str, tuple[float, ...]]  # by start
Row = dict[str, Any]


# Chains


def make_chain(method: str, draw: int, rates: Rates, folder: Path, split: str) -> Path:
    """The recipe's chain for each start and learning rate, and one evaluation of all models on `split`."""
    data = folder / f"data-{draw}"
    words = ["--output_dir", str(data), "--seed", str(draw)]
    subprocess.run([sys.executable, str(QUICKSTART / "task.py"), *words], check=True, stdout=subprocess.DEVNULL)
    recipe = yaml.safe_load(METHODS[method].read_text().replace(DATA, str(data)))
    *stages, evaluation = recipe["stages"]
    made = {stage["name"]: stage for start in rates for stage in _stages(stages, method, start, rates[start], draw)}
    models = [name for name, stage in made.items() if stage["command"] != "eval"]
    evaluation |= {
        "name": f"eval-{method}",
        "model_name_or_path": [STUDENT, *(f"${{stages.{name}.output_dir}}" for name in models)],
        "dataset": str(data / f"{split}.jsonl"),
    }
    content = recipe | {"output_dir": str(folder / f"draw-{draw}"), "stages": [*made.values(), evaluation]}
    file = folder / f"{method}-{draw}.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def _stages(recipe: list[Row], method: str, start: str, rates: tuple[float, ...], draw: int) -> Iterator[Row]:
    """A recipe's stages for one start; its last one once for each learning rate."""
    for given in recipe:
        stage = yaml.safe_load(yaml.safe_dump(given).replace(".output_dir", f"-{start}.output_dir"))
        stage["name"] = f"{given.get('name', given['command'])}-{start}"
        if stage["command"] == "sft":
            if start == "none":
                continue
            own = yaml.safe_load((QUICKSTART / f"{start}.yaml").read_text())
            stage = {key: value for key, value in stage.items() if key not in OF_THE_LOSS}
            stage |= {key: own[key] for key in OF_THE_LOSS if key in own}
        else:
            stage["model_name_or_path"] = STUDENT if start == "none" else f"${{stages.sft-{start}.output_dir}}"
        if stage["command"] != "eval":
            stage["seed"] = draw
        if stage["command"] != method:
            yield stage
            continue
        for rate in rates:
            yield stage | {"name": f"{stage['name']}-{rate:g}", "learning_rate": rate}


def run_chain(file: Path) -> None:
    """Run `trl-qtarget chain` with its stages in this process, since loading TRL takes as long as most stages."""
    from trl_qtarget.chain import execute
    from trl_qtarget.cli.main import main

    with mock.patch.object(execute, "execute", _execute_here):
        if main(["chain", "--config", str(file)]):
            sys.exit(f"The chain of {file} has failed: the same command goes on from there.")


def _execute_here(stage: Any, words: list[str], fresh: bool, show: Any) -> int:
    from trl_qtarget.chain.commands import PLUGIN
    from trl_qtarget.chain.execute import check_step0, history
    from trl_qtarget.chain.validate import parser

    package = "trl_qtarget" if stage.command in PLUGIN else "trl"
    values = parser(stage.command, stage.command).parse(words[1:]).values
    with stage.log.open("w" if fresh else "a") as log, redirect_stdout(log), redirect_stderr(log):
        importlib.import_module(f"{package}.scripts.{stage.command}").main(*values)
    for row in history(stage.log)[:1]:
        check_step0(stage, row)
    return 0


# What came out


def scores(folder: Path, draw: int, method: str) -> dict[str, Row]:
    """The evaluation's results by stage; the student's as `none`."""
    results = json.loads((folder / f"draw-{draw}/eval-{method}/results/results.json").read_text())["results"]
    return {"none" if r["model"] == STUDENT else Path(r["model"]).parts[-2]: r for r in results}


def before_and_after(found: dict[str, Row], method: str, start: str, rate: float) -> Row:
    """The scores of a start before and after GRPO or DPO."""
    results = {
        "before": found["none" if start == "none" else f"sft-{start}"],
        "after": found[f"{method}-{start}-{rate:g}"],
    }
    return {f"{when}_{score}": result[score] for when, result in results.items() for score in SCORES}


def choose(method: str, folder: Path) -> tuple[dict[str, float], list[Row]]:
    """The best learning rate of each start on validation problems, and all that were tried."""
    rows = []
    for draw in CHOICE_DRAWS:
        run_chain(make_chain(method, draw, dict.fromkeys(STARTS, RATES[method]), folder, "validation"))
        found = scores(folder, draw, method)
        for start in STARTS:
            for rate in RATES[method]:
                row = {"start": start, "learning_rate": rate, "draw": draw}
                rows.append(row | before_and_after(found, method, start, rate))
    best = {}
    for start in STARTS:
        tried = {
            rate: [r for r in rows if (r["start"], r["learning_rate"]) == (start, rate)] for rate in RATES[method]
        }
        means = {rate: statistics.mean(r["after_average_at_k"] for r in those) for rate, those in tried.items()}
        best[start] = max(means, key=lambda rate: means[rate])
    return best, rows


def compare(method: str, best: dict[str, float], folder: Path) -> tuple[list[Row], list[Row]]:
    """Scores of each start before and after GRPO or DPO, and the curves, draw by draw."""
    from trl_qtarget.chain.execute import history

    rows, curves = [], []
    every = yaml.safe_load(METHODS[method].read_text())["stages"][-2]["logging_steps"]
    for draw in DRAWS:
        run_chain(make_chain(method, draw, {start: (rate,) for start, rate in best.items()}, folder, "test"))
        found = scores(folder, draw, method)
        for start, rate in best.items():
            log = history(folder / f"draw-{draw}/{method}-{start}-{rate:g}/log.txt")
            logged = [point for point in log if CURVES[method][0] in point]
            steps = [max(1, number * every) for number in range(len(logged))]  # the first one is always logged
            updates = [step - last for last, step in pairwise([0, *steps])]  # that a point is the mean of
            if method == "grpo":
                own = {ALIKE: round(statistics.fmean((point[ALIKE] for point in logged), updates), 4)}
            else:
                pairs = folder / f"draw-{draw}/pairs-{start}/results/pairs.jsonl"
                own = {"pairs": len(pairs.read_text().splitlines())}
            rows.append(
                {"start": start, "draw": draw, "learning_rate": rate, "entropy": logged[0].get("entropy")}
                | own
                | before_and_after(found, method, start, rate)
            )
            for step, point in zip(steps, logged, strict=True):
                row = {"start": start, "draw": draw, "step": step}
                curves.append(row | {key: point.get(key) for key in LOGGED[method]})
    return rows, curves


def table(method: str, rows: list[Row]) -> str:
    """Two tables in Markdown: per cent, +- standard error over draws; differences are taken draw by draw."""
    from recipes.quickstart.report import mean_and_error

    def column(start: str, key: str, scale: float = 100) -> list[float]:
        return [scale * r[key] for r in rows if r["start"] == start]

    def difference(a: list[float], b: list[float]) -> str:
        return mean_and_error([x - y for x, y in zip(a, b, strict=True)], "+")

    extra, shares = ("entropy", {ALIKE: "all alike"}) if method == "grpo" else ("pairs", {})
    columns = [f"{when}_{score}" for score in SCORES for when in ("before", "after")]
    names = [name for score in SCORES.values() for name in (f"{score} before", "after")]
    head = ["SFT before", f"rate of {method.upper()}", extra, *shares.values(), *names, "gain in Average@16"]
    lines = [head, ["---"] * len(head)]
    for start in STARTS:
        cells = [f"`{start}`", f"{column(start, 'learning_rate', 1)[0]:g}"]
        cells.append(f"{statistics.mean(column(start, extra, 1)):{'.0f' if extra == 'pairs' else '.3f'}}")
        cells += [mean_and_error(column(start, key)) for key in (*shares, *columns)]
        lines.append([*cells, difference(column(start, "after_average_at_k"), column(start, "before_average_at_k"))])
    head = ["`target_sft` minus", *names]
    lines += [[], head, ["---"] * len(head)]
    for other in ("nll", "dft", "none"):
        lines.append([f"`{other}`", *(difference(column("target_sft", key), column(other, key)) for key in columns)])
    return "\n".join("| " + " | ".join(cells) + " |" if cells else "" for cells in lines)


def draw_curves(method: str, curves: list[Row], target: Path) -> None:
    """Mean over draws, and a band of one standard error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from recipes.quickstart.report import COLORS, error

    key, label, updates = CURVES[method]
    figure, axes = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
    for start in STARTS:
        steps = sorted({r["step"] for r in curves if r["start"] == start} - {1})  # a tenth of the others' completions
        values = [[float(r[key]) for r in curves if (r["start"], r["step"]) == (start, step)] for step in steps]
        means, errors = [statistics.mean(v) for v in values], [error(v) or 0.0 for v in values]
        color = COLORS.get(start, "#8b949e")
        axes.plot(steps, means, color=color, lw=2, label="no SFT" if start == "none" else f"after {start}")
        low, high = zip(*((m - e, m + e) for m, e in zip(means, errors, strict=True)), strict=True)
        axes.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
    axes.set(xlabel=updates, ylabel=label)
    draws = len({r["draw"] for r in curves})
    axes.set_title(
        f"{method.upper()} from four starts; mean and standard error of {draws} draws", loc="left", fontsize=11
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6")
    axes.legend(frameon=False)
    figure.savefig(target, dpi=140)
    pyplot.close(figure)


def main() -> None:
    """Compare one method after the other; finished stages are not run again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/chains"), help="default: runs/chains")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: both")
    args = parser.parse_args()
    if not QUICKSTART.is_dir():
        sys.exit("Start it in the repository's own folder: python -m benchmarks.chains")
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}  # before torch is read
    from benchmarks.machine import provenance, save

    args.output_dir.mkdir(parents=True, exist_ok=True)
    for method in args.methods:
        best, tried = choose(method, args.output_dir)
        rows, curves = compare(method, best, args.output_dir)
        facts = provenance()
        save(f"chain_{method}_rates", tried, facts)
        save(f"chain_{method}_curves", curves, facts)
        path = save(f"chain_{method}", rows, facts)
        draw_curves(method, curves, path.with_suffix(".png"))
        print(table(method, rows))
        print(f"{path}, and its picture")


if __name__ == "__main__":
    main()
