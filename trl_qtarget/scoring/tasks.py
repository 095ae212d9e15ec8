"""The three tasks of `trl-qtarget cache`: estimate what a cache would take, fill the cache, and verify some rows."""

import random
import time
from contextlib import nullcontext
from importlib.metadata import version

import numpy as np
from tqdm import tqdm

from ..cache.reader import TeacherCache, readable
from ..cache.shards import Entry
from ..cache.writer import CacheWriter, alone
from .run import CacheRun


TRIAL_BATCHES = 3  # the batches that `estimate` times
TOLERANCE = 0.05  # in nats and in probability: half precision and another padding may differ by as much


class CacheMismatch(ValueError):
    """The cached rows differ from what the run's teacher gives for them."""


def estimate(run: CacheRun) -> str:
    """Score a few batches, and say how large a cache of all rows would be and how long the scoring would take."""
    tokens, labels = sum(row.tokens for row in run.rows.values()), sum(row.labels for row in run.rows.values())
    batches = list(run.batches(run.by_length()))
    trial = batches[:: max(len(batches) // TRIAL_BATCHES, 1)][:TRIAL_BATCHES]
    run.score(trial[0])  # the first batch is slow: it allocates
    start = time.perf_counter()
    for batch in trial:
        run.score(batch)
    rate = sum(run.rows[key].tokens for batch in trial for key in batch) / (time.perf_counter() - start)
    width = {"float16": 6, "float32": 8}[run.dtype] * run.k + 12
    processes = min(run.accelerator.num_processes, -(-labels // run.options.shard_tokens))  # each takes whole shards
    return (
        f"{len(run.rows)} distinct sequences, {tokens} tokens, {labels} labels; "
        f"about {labels * width / 2**20:.1f} MiB at {width} bytes a label; "
        f"about {tokens / rate / processes:.0f} s at {rate:.0f} tokens/s on {processes} process(es)"
    )


def fill(run: CacheRun) -> int:
    """Score the rows that the cache lacks, each process its share of the shards, and return the number of these rows.

    Raises:
        CacheError: the folder holds a cache of other settings, or other files, or another run writes into it.
    """
    with alone(run.folder) if run.accelerator.is_main_process else nullcontext():
        return _fill(run)


def _fill(run: CacheRun) -> int:
    accelerator, settings = run.accelerator, run.settings()
    quiet = not accelerator.is_main_process
    with accelerator.main_process_first():
        writer = CacheWriter(run.folder, settings, disable=quiet)
    sizes = ((key, row.tokens, row.labels) for key, row in run.rows.items())
    shards = writer.plan(sizes, run.options.shard_tokens)
    accelerator.wait_for_everyone()  # no process may write before all have planned from the same files
    share = [shard for shard in shards[accelerator.process_index :: accelerator.num_processes] if not shard.done]
    tokens = sum(run.rows[key].tokens for shard in share for key in shard.keys)
    with tqdm(total=tokens, unit=" tokens", desc="Scoring", disable=quiet) as bar:
        for shard in share:
            entries: list[Entry] = []
            for batch in run.batches(list(shard.keys)):
                entries += run.score(batch)
                bar.update(sum(run.rows[key].tokens for key in batch))
                bar.set_postfix(rows=len(entries), shard=shard.name)
            writer.write(shard, entries)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        writer.commit({name: version(name) for name in ("trl-qtarget", "transformers", "torch")})
    accelerator.wait_for_everyone()
    return sum(len(shard.keys) for shard in shards if not shard.done)


def verify(run: CacheRun) -> str:
    """Score random rows of the cache again, one at a time, and say by how much they differ.

    Raises:
        CacheMismatch: some row differs by more than `TOLERANCE`.
    """
    cache = TeacherCache(run.folder)
    keys = random.sample(sorted(run.rows), min(run.options.verify, len(run.rows)))
    nats = moved = 0.0
    for key in keys:
        (scored,), kept = run.score([key]), cache[key]
        nats = max(nats, float(np.abs(scored.log_p_y - kept.log_p_y).max()))
        moved = max(moved, _most_moved(scored, kept))
    found = f"{len(keys)} rows scored again: log p(y) differs by at most {nats:.1e} nats, the mass by {moved:.1e}"
    if max(nats, moved) > TOLERANCE:
        raise CacheMismatch(
            f"{found}; the cache {run.folder} was not scored by this teacher, or has changed: make the cache in "
            "another folder"
        )
    return found


def _most_moved(one: Entry, other: Entry) -> float:
    """Return the largest total variation between two entries of a row, over its labels; an id that one lacks has 0."""
    largest = 0.0
    for ids, log_probs, other_ids, other_log_probs in zip(*readable(one), *readable(other), strict=True):
        p = dict(zip(ids.tolist(), np.exp(log_probs).tolist(), strict=True))
        q = dict(zip(other_ids.tolist(), np.exp(other_log_probs).tolist(), strict=True))
        largest = max(largest, 0.5 * sum(abs(p.get(id, 0) - q.get(id, 0)) for id in p.keys() | q.keys()))
    return largest
