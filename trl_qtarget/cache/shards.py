"""The files of a teacher cache: Arrow shards with the rows, and JSON files that hold a checksum of themselves.

manifest.json      the settings, and the size and sha256 of every shard
shard-00000.arrow  a record for each row, all in one batch, so that an entry is a slice of the mapped file
shard-00000.json   the shard's sidecar, until a commit lists the shard in the manifest
README.md          the dataset card
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from ..files import replacing
from . import MANIFEST
from .fingerprints import digest


FORMAT = "trl_qtarget teacher cache, version 1"
SHARD = re.compile(r"shard-\d{5,}\.arrow")
LARGE = 10**9  # bytes; checking more than this shows a progress bar


class CacheError(ValueError):
    """A cache that cannot be used; the message is one sentence and says what to do."""


class Entry(NamedTuple):
    """The teacher's distribution at the n labelled tokens of one row, in nats.

    The arrays of an entry that was read from a cache are read-only views of the mapped file.
    """

    ids: np.ndarray  # (n, K) int32
    log_probs: np.ndarray  # (n, K) float16 or float32
    log_tail: np.ndarray  # (n,) float32, log of the probability outside the ids
    log_p_y: np.ndarray  # (n,) float32, of the label y
    mass: np.ndarray  # (n,) float32, p_T(y) plus the probability of every id that ranks below y


@dataclass(frozen=True)
class Settings:
    """The settings under which all rows of a cache were scored; a row of other settings does not fit in."""

    teacher: str
    teacher_revision: str | None
    teacher_fingerprint: str
    tokenizer_fingerprint: str
    template_fingerprint: str
    vocab_size: int
    k: int
    dtype: str  # of the log-probabilities
    max_length: int | None

    def __post_init__(self):
        if self.dtype not in ("float16", "float32"):
            raise CacheError(
                f"A cache keeps log-probabilities in float16 or float32, not {self.dtype!r}: choose one of the two."
            )
        if not 0 < self.k <= self.vocab_size:
            raise CacheError(f"A cache keeps 1 to {self.vocab_size} (all) ids of a label, not {self.k}: change k.")


class ShardPlan(NamedTuple):
    """Rows that are scored together and written as one shard."""

    name: str
    keys: tuple[str, ...]
    labelled: tuple[int, ...]  # the number of labels of each row
    plan: str  # digest of the plan that the shard belongs to
    done: bool  # whether an interrupted run of the same plan has written the shard


class Shard:
    """A shard's file, mapped into memory: reading a row copies nothing."""

    def __init__(self, path: Path, k: int):
        with pa.memory_map(str(path)) as file:  # the mapping outlives the descriptor: Arrow's buffers hold on to it
            batch = pa.ipc.open_stream(file).read_next_batch()
        self.k = k
        self.keys = np.frombuffer(batch["key"].buffers()[2], "S32", len(batch))
        self.offsets = batch["mass"].offsets.to_numpy()
        self.parts = [batch[name].values.to_numpy() for name in Entry._fields]

    def __getitem__(self, row: int) -> Entry:
        start, end = int(self.offsets[row]), int(self.offsets[row + 1])
        wide = [part[start * self.k : end * self.k].reshape(end - start, self.k) for part in self.parts[:2]]
        return Entry(*wide, *(part[start:end] for part in self.parts[2:]))


def write_shard(folder: Path, shard: ShardPlan, entries: Sequence[Entry], settings: Settings) -> dict[str, Any]:
    """Write a shard and then its sidecar, and return the sidecar's content, which `write_manifest` lists later.

    The sidecar comes second: an interrupted run leaves no sidecar of a shard that is not complete on the disk.

    Raises:
        ValueError: the entries do not fit the planned rows, or hold NaN.
    """
    batch = _batch(shard, entries, settings)
    path = folder / shard.name
    with replacing(path) as file, pa.ipc.new_stream(file, batch.schema) as stream:
        stream.write_batch(batch)
    about = {
        "name": shard.name,
        "sha256": _sha256(path),
        "bytes": path.stat().st_size,
        "rows": len(shard.keys),
        "tokens": sum(shard.labelled),
        "keys": digest(shard.keys),
        "plan": shard.plan,
    }
    with replacing(path.with_suffix(".json")) as file:
        file.write(_sealed(about))
    return about


def _batch(shard: ShardPlan, entries: Sequence[Entry], settings: Settings) -> pa.RecordBatch:
    assert all(len(key) == 32 for key in shard.keys)  # `Shard` reads the keys as one array of fixed width
    k = settings.k
    if len(entries) != len(shard.keys):
        raise ValueError(f"{shard.name} has {len(shard.keys)} rows, not {len(entries)}: give one entry for each.")
    for key, n, entry in zip(shard.keys, shard.labelled, entries, strict=True):
        if [part.shape for part in entry] != [(n, k), (n, k), (n,), (n,), (n,)]:
            raise ValueError(f"The entry of row {key} does not have {n} labels of {k} ids each: compute it again.")
        if any(np.isnan(part).any() for part in entry[1:]):
            raise ValueError(f"The teacher gives NaN for row {key}: load it in another dtype, such as bfloat16.")
    offsets = np.cumsum([0, *shard.labelled])

    def column(name: str, dtype: str, width: int = 1) -> pa.ListArray:
        with np.errstate(over="ignore"):  # below float16's range a log-probability becomes -inf
            parts = [getattr(entry, name).reshape(-1).astype(dtype) for entry in entries]
        return pa.ListArray.from_arrays(pa.array(offsets * width, pa.int32()), pa.array(np.concatenate(parts)))

    columns = {
        "key": pa.array(shard.keys, pa.string()),
        "n": pa.array(shard.labelled, pa.int32()),
        "ids": column("ids", "int32", k),
        "log_probs": column("log_probs", settings.dtype, k),
    }
    return pa.record_batch(columns | {name: column(name, "float32") for name in ("log_tail", "log_p_y", "mass")})


def faults(folder: Path, shards: Sequence[dict], contents: bool, disable: bool) -> Iterator[tuple[str, str]]:
    """Yield the name of every shard that is not as it was written, and what is wrong with it.

    Args:
        contents: compare sha256 sums, which reads all of every file; if false, compare sizes only.
        disable: show no progress bar.
    """
    size = sum(shard["bytes"] for shard in shards)
    disable = disable or not contents or size < LARGE
    with tqdm(total=size, unit="B", unit_scale=True, desc="Checking the cache", disable=disable) as bar:
        for shard in shards:
            path = folder / shard["name"]
            if not path.is_file():
                yield shard["name"], "is missing"
            elif path.stat().st_size != shard["bytes"]:
                yield shard["name"], f"has {path.stat().st_size} bytes instead of {shard['bytes']}"
            elif contents and _sha256(path) != shard["sha256"]:
                yield shard["name"], "is damaged, its sha256 has changed"
            bar.update(shard["bytes"])


def write_manifest(
    folder: Path, settings: Settings, shards: Mapping[str, dict], versions: dict[str, str] | None
) -> list[dict[str, Any]]:
    """Write the manifest, and return the shards as it lists them.

    The plan of a shard is left out: it depends on where runs were interrupted, and without it any course of runs ends
    with the same bytes. `versions` is None until the first commit.
    """
    listed = [{k: v for k, v in shards[name].items() if k != "plan"} for name in sorted(shards)]
    content = {"format": FORMAT, "settings": asdict(settings), "versions": versions, "shards": listed}
    with replacing(folder / MANIFEST) as file:
        file.write(_sealed(content))
    return listed


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check a manifest.

    Raises:
        CacheError: the manifest is damaged, is of another format, or names a file outside the folder.
    """
    path, remedy = folder / MANIFEST, "read it with the version of trl-qtarget that wrote it"
    content = unsealed(path)
    if content.get("format") != FORMAT:
        raise CacheError(f"{path} is not of the format {FORMAT!r}: {remedy}.")
    strange = set(content["settings"]) ^ {field.name for field in fields(Settings)}
    # a name such as ../x/shard-00000.arrow is no shard's: a manifest must not make its reader open other files
    strange |= {shard["name"] for shard in content["shards"] if not SHARD.fullmatch(shard["name"])}
    if strange:
        raise CacheError(f"{path}: the entry {sorted(strange)[0]!r} is unknown or missing: {remedy}.")
    return content


def _sealed(content: Mapping[str, Any]) -> bytes:
    """Return the content as JSON with one more entry, `seal`: the sha256 of the rest."""
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "seal": seal}, indent=1) + "\n").encode()


def unsealed(path: Path) -> dict[str, Any]:
    """Read a file that `_sealed` made.

    Raises:
        CacheError: any byte of the file has changed.
    """
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
        del content["seal"]
        if _sealed(content) == raw:  # compares bytes: a change that leaves the parsed JSON equal is damage too
            return content
    except (ValueError, KeyError, TypeError):
        pass
    raise CacheError(
        f"{path} is damaged, or was not written by `trl-qtarget cache`: restore it, or make the cache in another "
        "folder."
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
