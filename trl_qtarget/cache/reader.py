"""The reading end of a teacher cache: the entry of a row, found by the row's key."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from . import MANIFEST
from .shards import CacheError, Entry, Settings, Shard, faults, read_manifest


class TeacherCache:
    """A reader of a cache in a folder, or in a dataset on the Hub, which is downloaded. `cache[key]` is a row's entry.

    All shards are compared with their sha256 first; with `verify=False` only their sizes are. The reader may be handed
    to the workers of a data loader by fork or by pickle: a worker maps the shards that it reads.

    Raises:
        CacheError: there is no cache, or one of its files is missing or damaged.
    """

    def __init__(self, folder_or_hub_id: str | Path, verify: bool = True, disable: bool = False):
        self.folder = Path(folder_or_hub_id).absolute()
        remedy = "delete it and run `trl-qtarget cache` again, which fills the gap"
        if not self.folder.is_dir():
            self.folder = _download(str(folder_or_hub_id))
            remedy = "delete it and the file it links to, and it is downloaded again"
        if not (self.folder / MANIFEST).is_file():
            raise CacheError(f"{folder_or_hub_id} has no {MANIFEST}: make the cache with `trl-qtarget cache`.")
        manifest = read_manifest(self.folder)
        if manifest["versions"] is None:
            raise CacheError(f"The cache in {self.folder} is not finished: run its `trl-qtarget cache` again.")
        shards = manifest["shards"]
        for name, fault in faults(self.folder, shards, verify, disable):
            raise CacheError(f"{self.folder / name} {fault}: {remedy}.")
        self.settings = Settings(**manifest["settings"])
        self.rows, self.tokens = (sum(shard[name] for shard in shards) for name in ("rows", "tokens"))
        self.cause = ""  # a known reason, as a clause, why rows of a run may be missing
        self._paths = [self.folder / shard["name"] for shard in shards]
        self._starts = np.cumsum([0, *(shard["rows"] for shard in shards)])
        self._mapped: dict[int, Shard] = {}
        keys = np.concatenate([np.empty(0, "S32"), *(Shard(path, self.settings.k).keys for path in self._paths)])
        self._order = np.argsort(keys)
        self._keys = keys[self._order]

    def __len__(self) -> int:
        return self.rows

    def __contains__(self, key: str) -> bool:
        return self._row(key) is not None

    def __getitem__(self, key: str) -> Entry:
        row = self._row(key)
        if row is None:
            raise KeyError(key)
        number = int(self._starts.searchsorted(row, "right")) - 1
        if number not in self._mapped:
            self._mapped[number] = Shard(self._paths[number], self.settings.k)
        return self._mapped[number][row - self._starts[number]]

    def __reduce__(self):
        return type(self), (self.folder, False), {"cause": self.cause}

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return the distinct keys that the cache lacks, in their order."""
        keys = list(dict.fromkeys(keys))
        if not keys or not self.rows:
            return keys
        wanted = np.array(keys, "S")
        held = self._keys[self._keys.searchsorted(wanted).clip(max=self.rows - 1)] == wanted
        return [key for key, is_held in zip(keys, held, strict=True) if not is_held]

    def check(
        self,
        *,
        tokenizer_fingerprint: str | None = None,
        template_fingerprint: str | None = None,
        vocab_size: int | None = None,
        max_length: int | None = None,
    ) -> None:
        """Check that the cache was made with the run's settings; a setting of None is not compared.

        Raises:
            CacheError: a setting differs; the message names it, with the value of the cache and that of the run.
        """
        run = {
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "template_fingerprint": template_fingerprint,
            "vocab_size": vocab_size,
            "max_length": max_length,
        }
        made = asdict(self.settings)
        if differing := [name for name in run if run[name] not in (None, made[name])]:
            cache, given = (", ".join(f"{name}={side[name]!r}" for name in differing) for side in (made, run))
            raise CacheError(
                f"The cache in {self.folder} was made from {self.settings.teacher} with {cache}, and this run "
                f"has {given}: make it again with `trl-qtarget cache`, or give this run what the cache has."
            )

    def _row(self, key: str) -> int | None:
        wanted = key.encode()
        place = self._keys.searchsorted(wanted)
        return int(self._order[place]) if place < self.rows and self._keys[place] == wanted else None


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise CacheError(
            f"{name} is no folder, and no dataset that the Hub gives ({reason}): check its name."
        ) from error


def readable(entry: Entry) -> tuple[np.ndarray, np.ndarray]:  # (n, K) int32, (n, K) float32
    """Return the ids, and log-probabilities that leave `exp(log_tail)` of the probability to all other ids.

    Rounding to float16 moves the sum of the K probabilities by up to 1e-3. A loss takes one minus that sum for the
    tail, and would then train ids that the teacher gives no probability. Where the tail is more than half of the
    distribution, log-probabilities stay as they are: the error is small beside such a tail, and one minus the tail
    would be too inexact to correct them by.
    """
    log_probs = entry.log_probs.astype(np.float64)
    tail = np.minimum(entry.log_tail.astype(np.float64), 0)
    small = tail < np.log(0.5)
    known = np.log(-np.expm1(np.where(small, tail, -1.0)))
    log_probs += np.where(small, known - np.logaddexp.reduce(log_probs, axis=-1), 0)[:, None]
    return entry.ids, log_probs.astype(np.float32)
