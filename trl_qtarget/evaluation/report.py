"""Turn scored samples into numbers, a table and files."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath

from ..files import write_text


@dataclass(frozen=True)
class Sample:
    """A completion of a row and its score from 0 to 1.

    `sample` is the number of the sample, or None for the greedy completion. `tokens` includes the end-of-sequence
    token.
    """

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
    """The scores of one model, as shares of 1.

    `mean_tokens` and `ended` are means over the k samples; the greedy completion is not counted.
    """

    model: str
    average_at_k: float
    average_at_k_se: float | None
    gain: float | None  # average_at_k minus that of the first model, row by row; None for the first model
    gain_se: float | None
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


def summarize(
    samples: Sequence[Sample], prompts: Sequence[Hashable], baseline: Sequence[Sample] | None = None
) -> dict:
    """Compute the fields of `Result` that depend on the samples alone.

    Args:
        prompts: one value per row; rows with equal values count together in the standard errors.
        baseline: the samples of the first model, to which the gain is measured.
    """
    drawn = [s for s in samples if s.sample is not None]
    average = scores_by_row(drawn)
    greedy = scores_by_row(s for s in samples if s.sample is None)
    passed = scores_by_row(drawn, lambda scores: float(max(scores) == 1))
    gain = None
    if baseline is not None:
        before = scores_by_row(s for s in baseline if s.sample is not None)
        gain = [after - before for after, before in zip(average, before, strict=True)]
    return {
        "average_at_k": mean(average),
        "average_at_k_se": standard_error(average, prompts),
        "gain": None if gain is None else mean(gain),
        "gain_se": None if gain is None else standard_error(gain, prompts),
        "greedy": mean(greedy),
        "greedy_se": standard_error(greedy, prompts),
        "pass_at_k": mean(passed),
        "mean_tokens": mean(s.tokens for s in drawn),
        "ended": mean(s.ended for s in drawn),
        "k": len(drawn) // len(prompts),
        "rows": len(prompts),
        "distinct_prompts": len(set(prompts)),
    }


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def scores_by_row(samples: Iterable[Sample], combine: Callable[[list[float]], float] = mean) -> list[float]:
    rows = defaultdict(list)
    for sample in samples:
        rows[sample.row].append(sample.score)
    return [combine(rows[row]) for row in sorted(rows)]


def standard_error(values: Sequence[float], groups: Sequence[Hashable]) -> float | None:
    """Return the standard error of the mean of values that are correlated within groups, or None for a single group.

    se^2 = G / (G - 1) * sum_g (sum_{i in g} (x_i - mean))^2 / n^2       equal to s^2 / n if every group is one value
    """
    center = mean(values)
    sums = defaultdict(float)
    for value, group in zip(values, groups, strict=True):
        sums[group] += value - center
    if len(sums) < 2:
        return None
    return math.sqrt(len(sums) / (len(sums) - 1) * math.fsum(s * s for s in sums.values())) / len(values)


def table(results: Sequence[Result]):
    """Return the results as a rich table, in percent."""
    from rich.markup import escape
    from rich.table import Table

    k = results[0].k
    out = Table(box=None, pad_edge=False)
    out.add_column("model", overflow="fold")
    # the last component of a path is enough if it tells the models apart, and leaves room for the numbers
    ends = [PurePath(r.model).name for r in results]
    names = ends if len(set(ends)) == len(ends) else [r.model for r in results]
    gain = ["gain"] if len(results) > 1 else []
    for name in (f"Average@{k}", *gain, "greedy", f"pass@{k}", "tokens", "ended"):
        out.add_column(name, justify="right", no_wrap=True)
    for model, r in zip(names, results, strict=True):
        gained = [with_error(r.gain, r.gain_se, sign="+")] if gain else []
        out.add_row(
            escape(model),
            with_error(r.average_at_k, r.average_at_k_se),
            *gained,
            with_error(r.greedy, r.greedy_se),
            f"{100 * r.pass_at_k:.1f}",
            f"{r.mean_tokens:.1f}",
            f"{100 * r.ended:.1f}",
        )
    return out


def with_error(share: float | None, error: float | None, sign: str = "") -> str:
    if share is None:
        return ""
    return f"{100 * share:{sign}.1f}" + ("" if error is None else f" +- {100 * error:.1f}")


def notes(results: Sequence[Result]) -> str:
    """Explain the columns, and warn where the numbers are easily misread."""
    first = results[0]
    lines = ["Percent, +- standard error over prompts. tokens: mean length of a sample; ended: by the model itself."]
    if len(results) > 1:
        lines.append("gain: Average over the first model's, prompt by prompt and under the same noise.")
    if first.distinct_prompts < first.rows:
        lines.append(
            f"The {first.rows} rows have {first.distinct_prompts} different prompts: the rows of one prompt count "
            "together in the standard errors."
        )
    if min(r.ended for r in results) < 0.9:
        lines.append("Many samples were cut before they ended: a higher --max_new_tokens may change the numbers.")
    return "\n".join(lines)


def samples_file(folder: str, label: str) -> Path:
    return Path(folder, f"samples-{label}.jsonl")


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write one line per sample, ordered by row; a row's greedy completion comes first, with `"sample": null`."""
    ordered = sorted(samples, key=lambda s: (s.row, -1 if s.sample is None else s.sample))
    write_rows(path, [asdict(s) | {"correct": s.correct} for s in ordered])


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object per line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
