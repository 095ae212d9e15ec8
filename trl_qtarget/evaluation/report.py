"""From scored samples to numbers, a table and files."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """A completion and its score, 0 to 1. `sample` is None for the greedy one; `tokens` counts the one that ended it."""

    row: int
    sample: int | None
    completion: str
    score: float
    ended: bool
    tokens: int

    @property
    def correct(self) -> bool:
        return self.score == 1


@dataclass(frozen=True)
class Result:
    """A model's scores, as shares of 1. Length and ended are of the k samples, without the greedy one."""

    model: str
    average_at_k: float
    average_at_k_se: float | None
    greedy: float
    greedy_se: float | None
    pass_at_k: float
    mean_tokens: float
    ended: float
    k: int
    rows: int
    distinct_prompts: int
    seconds: float
    dtype: str
    device: str


def summarize(samples: Sequence[Sample], prompts: Sequence[Hashable]) -> dict:
    """The measures of `Result` that come from the samples; `prompts` says which rows ask the same."""
    by_row = defaultdict(list)
    greedy = [0.0] * len(prompts)
    for sample in samples:
        if sample.sample is None:
            greedy[sample.row] = sample.score
        else:
            by_row[sample.row].append(sample)
    drawn = [sample for row in by_row.values() for sample in row]
    average = [mean(s.score for s in by_row[i]) for i in range(len(prompts))]
    return {
        "average_at_k": mean(average),
        "average_at_k_se": standard_error(average, prompts),
        "greedy": mean(greedy),
        "greedy_se": standard_error(greedy, prompts),
        "pass_at_k": mean(any(s.correct for s in by_row[i]) for i in range(len(prompts))),
        "mean_tokens": mean(s.tokens for s in drawn),
        "ended": mean(s.ended for s in drawn),
        "k": len(drawn) // len(prompts),
        "rows": len(prompts),
        "distinct_prompts": len(set(prompts)),
    }


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float], groups: Sequence[Hashable]) -> float | None:
    """Of the mean, where values of one group may go together; None from a single group.

    se^2 = G / (G - 1) * sum_g (sum_{i in g} (x_i - mean))^2 / n^2       which is s^2 / n if every group is one value
    """
    center = mean(values)
    sums = defaultdict(float)
    for value, group in zip(values, groups, strict=True):
        sums[group] += value - center
    if len(sums) < 2:
        return None
    return math.sqrt(len(sums) / (len(sums) - 1) * math.fsum(s * s for s in sums.values())) / len(values)


def table(results: Sequence[Result], title: str):
    """The results as a rich table, in percent."""
    from rich.markup import escape
    from rich.table import Table

    k = results[0].k
    out = Table(title=escape(title), title_justify="left", caption=caption(results), caption_justify="left")
    out.add_column("model", overflow="fold")
    for name in (f"Average@{k}", "greedy", f"pass@{k}", "tokens", "ended"):
        out.add_column(name, justify="right", no_wrap=True)
    for r in results:
        out.add_row(
            escape(r.model),
            with_error(r.average_at_k, r.average_at_k_se),
            with_error(r.greedy, r.greedy_se),
            f"{100 * r.pass_at_k:.1f}",
            f"{r.mean_tokens:.1f}",
            f"{100 * r.ended:.1f}",
        )
    return out


def with_error(share: float, error: float | None) -> str:
    return f"{100 * share:.1f}" + ("" if error is None else f" +- {100 * error:.1f}")


def caption(results: Sequence[Result]) -> str:
    """What the numbers do not say by themselves."""
    first = results[0]
    notes = ["Percent, +- standard error over prompts; tokens: mean length of a sample; ended: by the model itself."]
    if first.distinct_prompts < first.rows:
        notes.append(
            f"Only {first.distinct_prompts} of the {first.rows} rows have a prompt of their own: rows that share one "
            "are counted together in the standard error."
        )
    if min(r.ended for r in results) < 0.9:
        notes.append("Many samples were cut before they ended: a higher --max_new_tokens may change the numbers.")
    return "\n".join(notes)


def samples_file(folder: str, label: str) -> Path:
    return Path(folder, f"samples-{label}.jsonl")


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """One line a sample, by row; the greedy one comes first and has `"sample": null`."""
    ordered = sorted(samples, key=lambda s: (s.row, -1 if s.sample is None else s.sample))
    write(path, "".join(json.dumps(asdict(s) | {"correct": s.correct}, ensure_ascii=False) + "\n" for s in ordered))


def write(path: Path, text: str) -> None:
    """A whole file or none: an interrupted run leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
