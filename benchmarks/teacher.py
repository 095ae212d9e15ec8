"""Cost and accuracy of an offline teacher on a real model.

    python recipes/smollm2-135m/prepare.py
    python -m benchmarks.teacher

The teacher, SmolLM2-135M-Instruct, scores worded problems once with `trl-qtarget cache`. Printed and saved are

    scoring    tokens/s beside a plain forward pass of the same model, interleaved; bytes of a label
    distance   total variation between Target-SFT's Q from the cache and from the whole teacher, with a briefly
               fine-tuned student, for a tail of the student's shape, for renormalised top-K and for an even tail
    step       a training step from the cache beside one of loss=nll in the same trainer, interleaved

The run ends with an error unless K = V is the dense teacher and a teacher that is the student is exact at every K.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks import train
from benchmarks.kernel import console
from benchmarks.machine import provenance, save
from trl_qtarget import Residual, TopKLogits
from trl_qtarget.cache.sequences import TokenSequence, row_sequences
from trl_qtarget.model.forward import install
from trl_qtarget.scoring.score import score
from trl_qtarget.theory.reference import pool


KS = (8, 32, 128)
ETA = 0.5


def fill(args: argparse.Namespace) -> None:
    """Make the cache with `trl-qtarget cache` in a separate process; rows that are cached already stay."""
    words = [
        "--model_name_or_path", args.model, "--teacher_model_name_or_path", args.model, "--teacher_cache", args.cache,
        "--dataset_name", args.data.parent / "teacher-data", "--max_length", 512, "--top_k", args.k,
        "--use_cpu", "true", "--bf16", "false", "--dtype", "float32", "--report_to", "none", "--batch_tokens", 2048,
    ]  # fmt: skip
    subprocess.run([sys.executable, "-W", "ignore", "-m", "trl_qtarget", "cache", *map(str, words)], check=True)


def tokenized(args: argparse.Namespace) -> list[TokenSequence]:
    """The rows as the trainer makes them."""
    trainer = train.make("nll", args, str(args.data.parent / "unused"))
    return [sequence for row in trainer.train_dataset for sequence in row_sequences(row)]


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    install(model)
    return model


@torch.no_grad()
def scoring(model: Any, rows: list[TokenSequence], args: argparse.Namespace) -> list[dict]:
    """Tokens a second of `score` over those of a plain forward pass, turn by turn on the same sequence."""
    ratios: dict[int, list[float]] = {k: [] for k in KS}
    rates: dict[int, list[float]] = {k: [] for k in KS}
    for turn, sequence in enumerate(rows[: args.turns + 1]):
        ids = torch.from_numpy(sequence.ids).long()[None]
        for k in KS:
            start = time.perf_counter()
            model(input_ids=ids, use_cache=False)
            plain = time.perf_counter() - start
            start = time.perf_counter()
            score(model, [sequence], k)
            ours = time.perf_counter() - start
            if turn:  # the first one warms up
                ratios[k].append(plain / ours)
                rates[k].append(len(sequence.ids) / ours)
    return [
        {
            "part": "scoring", "k": k, "tail": "", "bytes_a_label": 6 * k + 12,
            "to_plain_forward": round(statistics.median(ratios[k]), 3),
            "tokens_a_second": round(statistics.median(rates[k])),
        }
        for k in KS
    ]  # fmt: skip


def target(log_p: Tensor, log_q: Tensor, labels: Tensor) -> Tensor:  # (n, V) twice, (n,) -> (n, V)
    """Target-SFT's Q."""
    p_y = log_p.gather(-1, labels[:, None]).exp()
    guided = pool(Residual(1 - ETA, ETA), log_p, log_q).exp()
    return ((1 - p_y) * guided).scatter_add(-1, labels[:, None], p_y)


def tails(log_p: Tensor, log_q: Tensor, labels: Tensor, k: int) -> dict[str, Tensor]:
    """log pi_T of all columns as three readers of k ids would fill it in."""
    ids = log_q.topk(k).indices
    outside = ~(ids == labels[:, None]).any(-1)
    ids[:, -1] = labels.where(outside, ids[:, -1])  # as the cache keeps the label
    known = log_q.gather(-1, ids)
    rest = torch.log(-torch.expm1(known.logsumexp(-1, keepdim=True).clamp(max=0)))
    columns = log_q.shape[-1]
    even = (rest - torch.log(torch.tensor(max(columns - k, 1)))).expand_as(log_q).scatter(-1, ids, known)
    nothing = torch.full_like(log_q, -torch.inf).scatter(-1, ids, known.log_softmax(-1))
    return {"student's shape": TopKLogits(ids, known).dense(log_p), "renormalised": nothing, "even": even}


@torch.no_grad()
def distances(student: Any, teacher: Any, rows: list[TokenSequence]) -> dict[tuple[int, str], Tensor]:
    """Total variation of each label's Q from that of the dense teacher, by k and tail."""
    found: dict[tuple[int, str], list[Tensor]] = {}
    for sequence in rows:
        ids = torch.from_numpy(sequence.ids).long()
        at = torch.from_numpy(sequence.labelled[1:])
        log_p, log_q = (m(input_ids=ids[None]).logits[0, :-1][at].double().log_softmax(-1) for m in (student, teacher))
        labels = ids[1:][at]
        dense = target(log_p, log_q, labels)
        for k in (*KS, log_q.shape[-1]):
            for name, filled in tails(log_p, log_q, labels, k).items():
                moved = 0.5 * (target(log_p, filled, labels) - dense).abs().sum(-1)
                found.setdefault((k, name), []).append(moved)
    return {key: torch.cat(parts) for key, parts in found.items()}


def distance(student: Any, teacher: Any, rows: list[TokenSequence]) -> list[dict]:
    between, same = distances(student, teacher, rows), distances(teacher, teacher, rows[:2])
    columns = teacher.config.vocab_size
    ours = "student's shape"
    if (worst := between[columns, ours].max()) > 1e-5:
        raise SystemExit(f"K = V is not the dense teacher: off by {worst:.1e}")
    if (worst := max(moved.max() for (_, name), moved in same.items() if name == ours)) > 1e-5:
        raise SystemExit(f"a teacher that is the student is not exact: off by {worst:.1e}")
    return [
        {
            "part": "distance", "k": k, "tail": name, "labels": len(moved),
            "mean": f"{moved.mean():.2e}", "p99": f"{moved.quantile(0.99):.2e}", "max": f"{moved.max():.2e}",
        }
        for (k, name), moved in between.items()
    ]  # fmt: skip


def step(args: argparse.Namespace) -> list[dict]:
    """A step of Target-SFT from the cache, of `nll` in the same trainer, and of Target-SFT with its teacher."""
    given = argparse.Namespace(**vars(args) | {"rows": 1, "only": ["nll", "target_sft cached", "target_sft"]})
    given.memory = True
    kept = ("seconds_a_step", "to_nll", "peak_mib", "share_of_head")
    return [
        {"part": "step", "tail": row["trainer"], **{key: row[key] for key in kept}} for row in train.compare(given)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=train.ROOT / "model", help="the teacher")
    parser.add_argument("--student", type=Path, default=train.ROOT / "target_sft", help="a fine-tuned copy of it")
    parser.add_argument("--data", type=Path, default=train.ROOT / "train.jsonl")
    parser.add_argument("--cache", type=Path, default=train.ROOT / "teacher-cache")
    parser.add_argument("--k", type=int, default=128, help="of the cache")
    parser.add_argument("--problems", type=int, default=300, help="rows that are scored")
    parser.add_argument("--compared", type=int, default=16, help="rows whose whole distributions are compared")
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = args.data.parent / "teacher-data"
    folder.mkdir(exist_ok=True)
    lines = args.data.read_text().splitlines(keepends=True)[: args.problems]
    (folder / "train.jsonl").write_text("".join(lines))
    args.teacher, args.rows = args.model, -(-args.problems // 8)
    start = time.perf_counter()
    fill(args)
    console.print(f"scored {len(lines)} problems in {time.perf_counter() - start:.0f} s, loading included")
    rows = tokenized(args)
    teacher = load(args.model)
    parts = [scoring(teacher, rows, args), distance(load(args.student), teacher, rows[: args.compared])]
    del teacher
    parts.append(step(args))
    for part in parts:
        table = Table(*part[0])
        for row in part:
            table.add_row(*map(str, row.values()))
        console.print(table)
    names = list(dict.fromkeys(name for part in parts for row in part for name in row))
    table_rows = [{name: row.get(name, "") for name in names} for part in parts for row in part]
    console.print(f"Written to {save('teacher_cpu', table_rows, provenance())}.")


if __name__ == "__main__":
    main()
