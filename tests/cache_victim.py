"""Writes a teacher cache of made-up rows, as one of several: `cache_victim.py FOLDER RANK WORLD COMMIT SEED`.

It imports neither torch nor TRL, so that it starts fast: `test_cache.py` kills it over and over.
"""

import contextlib
import os
import random
import sys
import time

import numpy as np

from trl_qtarget.cache.fingerprints import row_key
from trl_qtarget.cache.shards import CacheError, Entry, Settings
from trl_qtarget.cache.writer import CacheWriter, alone


SETTINGS = Settings("teacher", "main", "f0", "f1", "f2", vocab_size=50, k=5, dtype="float16", max_length=64)
VERSIONS = {"trl_qtarget": "0.1.0"}
SHARD_TOKENS = 40


def made_up_rows(count: int = 60, seed: int = 0) -> dict[str, tuple[int, int]]:
    """Tokens and labels by key."""
    draw = random.Random(seed)
    rows = {}
    for _ in range(count):
        ids = [draw.randrange(50) for _ in range(draw.randint(1, 12))]
        start = draw.randint(0, len(ids))
        rows[row_key(ids, [i >= start for i in range(len(ids))])] = (len(ids), len(ids) - start)
    return rows


def made_up_entry(key: str, n: int, k: int = 5, vocab: int = 50, dtype: str = "float16") -> Entry:
    """What a teacher of random logits, drawn from the key, says of n labels."""
    draw = np.random.default_rng(int(key, 16))
    log_p = draw.normal(size=(n, vocab)) * 4
    log_p -= np.logaddexp.reduce(log_p, axis=-1, keepdims=True)
    ids = np.argsort(-log_p, axis=-1)[:, :k].astype(np.int32)
    top = np.take_along_axis(log_p, ids, -1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.clip(1 - np.exp(top).sum(-1), 0, None)) if k < vocab else np.full(n, -np.inf)
    narrow = [part.astype(np.float32) for part in (tail, log_p[:, 0], np.exp(log_p[:, 0]))]
    return Entry(ids, top.astype(dtype), *narrow)


def fill(writer: CacheWriter, rows: dict[str, tuple[int, int]], rank: int = 0, world: int = 1) -> None:
    plan = writer.plan([(key, *counts) for key, counts in rows.items()], SHARD_TOKENS)
    for shard in plan[rank::world]:
        if not shard.done:
            writer.write(shard, [made_up_entry(key, n) for key, n in zip(shard.keys, shard.labelled, strict=True)])


def dawdle(name: str) -> None:
    """Wait before each call of a function of `os`, so that being killed between any two of them is likely."""
    call = getattr(os, name)
    setattr(os, name, lambda *args, **kwargs: (time.sleep(0.004), call(*args, **kwargs))[1])


def write(folder: str, rank: int, world: int, commit: int, seed: int = 0) -> None:
    with alone(folder) if world == 1 else contextlib.nullcontext():  # of several, the caller holds the folder
        print("holds", flush=True)
        writer = CacheWriter(folder, SETTINGS)
        fill(writer, made_up_rows(seed=seed), rank, world)
        if commit:
            writer.commit(VERSIONS)


if __name__ == "__main__":
    for name in ("fsync", "replace", "unlink"):
        dawdle(name)
    print("ready", flush=True)
    try:
        write(sys.argv[1], *map(int, sys.argv[2:]))
    except CacheError as mistake:
        print(mistake, flush=True)
        os._exit(2)
    os._exit(0)  # what Python does at its end takes longer than all of this
