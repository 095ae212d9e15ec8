"""The files of a teacher cache: shards of rows in Arrow, JSON that is sealed, and how either gets onto the disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm


FORMAT = "trl_qtarget teacher cache, version 1"
MANIFEST = "manifest.json"
SHARD = re.compile(r"shard-\d{5,}\.arrow")
LARGE = 10**9  # bytes whose check is worth a progress bar


class CacheError(ValueError):
    """A cache that cannot be used, in one sentence with the way out."""


class Entry(NamedTuple):
    """What the teacher says at the n labelled tokens of a row, in nats; read-only where it comes from a cache."""

    ids: np.ndarray  # (n, K) int32
    log_probs: np.ndarray  # (n, K) float16 or float32
    log_tail: np.ndarray  # (n,) float32, log of the mass outside the ids
    log_p_y: np.ndarray  # (n,) float32
    mass: np.ndarray  # (n,) float32, p_T(y) and the mass that ranks below y


@dataclass(frozen=True)
class Settings:
    """What makes two caches the same kind, so that rows of both could stand in one."""

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
            raise CacheError(f"A cache keeps float16 or float32, not {self.dtype!r}: choose one of the two.")
        if not 0 < self.k <= self.vocab_size:
            raise CacheError(f"A cache keeps from 1 to all {self.vocab_size} ids of a token, not {self.k}: change k.")


class ShardPlan(NamedTuple):
    """Rows that are computed and written together."""

    name: str
    keys: tuple[str, ...]
    labelled: tuple[int, ...]  # how many labels each row has
    plan: str  # which plan it is part of
    done: bool  # an earlier run of the plan has written it


class Shard:
    """A mapped file: reading a row of it copies nothing."""

    def __init__(self, path: Path, k: int):
        with pa.memory_map(str(path)) as file:  # the mapping lives as long as its buffers; the descriptor need not
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
    """What a manifest says of the shard, once it and a sidecar that says the same are on the disk."""
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
    assert all(len(key) == 32 for key in shard.keys)  # readers take them for an array
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
        with np.errstate(over="ignore"):  # what is below float16's range has no probability
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
    """Names of the shards that are not as they were written, each with what is wrong."""
    size = sum(shard["bytes"] for shard in shards)
    disable = disable or not contents or size < LARGE
    with tqdm(total=size, unit="B", unit_scale=True, desc="Checking the cache", disable=disable) as bar:
        for shard in shards:
            path = folder / shard["name"]
            if not path.is_file():
                yield shard["name"], "is missing"
            elif path.stat().st_size != shard["bytes"]:
                yield shard["name"], f"has {path.stat().st_size} bytes and not its {shard['bytes']}"
            elif contents and _sha256(path) != shard["sha256"]:
                yield shard["name"], "is damaged, its sha256 is another one"
            bar.update(shard["bytes"])


def write_manifest(
    folder: Path, settings: Settings, shards: Mapping[str, dict], versions: dict[str, str] | None
) -> list[dict[str, Any]]:
    """The shards as the manifest lists them: without what depends on how the runs went that wrote them."""
    listed = [{k: v for k, v in shards[name].items() if k != "plan"} for name in sorted(shards)]
    content = {"format": FORMAT, "settings": asdict(settings), "versions": versions, "shards": listed}
    with replacing(folder / MANIFEST) as file:
        file.write(_sealed(content))
    return listed


def read_manifest(folder: Path) -> dict[str, Any]:
    content = unsealed(folder / MANIFEST)
    if content.get("format") != FORMAT:
        raise CacheError(f"{folder / MANIFEST} is not of the format {FORMAT!r}: take the trl-qtarget that wrote it.")
    strange = set(content["settings"]) ^ {field.name for field in fields(Settings)}
    # names that lead out of the folder come from nobody's writer
    strange |= {shard["name"] for shard in content["shards"] if not SHARD.fullmatch(shard["name"])}
    if strange:
        raise CacheError(f"{folder / MANIFEST} speaks of {sorted(strange)[0]!r}: take the trl-qtarget that wrote it.")
    return content


def _sealed(content: Mapping[str, Any]) -> bytes:
    """JSON with a sha256 of itself."""
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "seal": seal}, indent=1) + "\n").encode()


def unsealed(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
        del content["seal"]
        if _sealed(content) == raw:  # byte by byte, as what JSON does not mind is damage too
            return content
    except (ValueError, KeyError, TypeError):
        pass
    raise CacheError(f"{path} is damaged, or no teacher cache's: restore it, or make the cache in another folder.")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when it is whole and on the disk, and is gone if it does not get there."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that no later file is on the disk before this one
        finally:
            os.close(folder)


def digest(keys: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(keys).encode(), digest_size=16).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
