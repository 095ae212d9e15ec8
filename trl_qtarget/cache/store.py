"""What a teacher said of every row, kept in a folder: its top-K log-probabilities, found by the content of the row.

    manifest.json      settings, and the size and sha256 of every shard
    shard-00000.arrow  one record a row and one batch a shard, so that a row is a slice of the mapped file
    shard-00000.json   while a run goes on: what the manifest will say of the shard
    README.md          the dataset card

A file has its name only once it is whole and on the disk: a shard, then its sidecar, and in the end the manifest. So
whatever stops a run, what it has finished counts, and the same run repeated ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .card import write_card
from .shards import (
    MANIFEST,
    CacheError,
    Entry,
    Settings,
    Shard,
    ShardPlan,
    digest,
    faults,
    read_manifest,
    replacing,
    unsealed,
    write_manifest,
    write_shard,
)


CARD = "README.md"
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
OURS = re.compile(rf"shard-\d{{5,}}\.(arrow|json)|{TEMPORARY.pattern}")


def row_key(input_ids: Any, labelled: Any) -> str:
    """A hash of a sequence's token ids and of which of them are labels: 32 hexadecimal digits."""
    ids, mask = np.asarray(input_ids, dtype="<i4"), np.asarray(labelled, dtype=bool)
    if ids.shape != mask.shape or ids.ndim != 1:
        raise ValueError(
            f"A row has ids of shape {ids.shape} and a mask of {mask.shape}: it needs one of each a token."
        )
    return hashlib.blake2b(ids.tobytes() + mask.tobytes(), digest_size=16).hexdigest()


def readable(entry: Entry) -> tuple[np.ndarray, np.ndarray]:  # (n, K) int32, (n, K) float32
    """Ids, and log-probabilities that leave `exp(log_tail)` of the mass to the tail.

    The sum of log-probabilities that were rounded to float16 is off by up to 1e-3, which a reader that takes what is
    missing from one for the tail would give to ids that have none. Where the tail is the larger part that error is
    nothing to it, while one minus the tail would say little of the ids: there they stay as they are.
    """
    log_probs = entry.log_probs.astype(np.float64)
    tail = np.minimum(entry.log_tail.astype(np.float64), 0)
    small = tail < np.log(0.5)
    known = np.log(-np.expm1(np.where(small, tail, -1.0)))
    log_probs += np.where(small, known - np.logaddexp.reduce(log_probs, axis=-1), 0)[:, None]
    return entry.ids, log_probs.astype(np.float32)


class CacheWriter:
    """Makes the cache in a folder, or continues the one that is there.

    Several processes may each have a writer of one folder and write different shards, and one commits when all are
    done. Each takes its part of the plan by position and then skips what is done, which a later one sees more of.

    Raises:
        CacheError: the folder holds another cache, or something else.
    """

    def __init__(self, folder: str | Path, settings: Settings, disable: bool = False):
        self.folder, self.settings, self.disable = Path(folder), settings, disable
        self.folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in self.folder.iterdir()}
        if MANIFEST not in names:
            if strange := sorted(name for name in names if not TEMPORARY.fullmatch(name)):
                raise CacheError(f"{folder} is not empty and no teacher cache, it holds {strange[0]}: choose another.")
            write_manifest(self.folder, settings, {}, versions=None)
        manifest = read_manifest(self.folder)
        self._require_same(manifest["settings"])
        sidecars = self._sidecars()
        self._committed = self._sound({s["name"]: s for s in manifest["shards"] if s["name"] not in sidecars})
        self._pending = self._sound(sidecars)
        self._keys: dict[str, list[str]] = {}

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The distinct keys that are not there yet, in order."""
        held = self._held(self._committed | self._pending)
        return [key for key in dict.fromkeys(keys) if key not in held]

    def plan(self, rows: Iterable[tuple[str, int, int]], shard_tokens: int) -> list[ShardPlan]:
        """How to write the missing rows, each a key, its tokens and its labels: shards of up to `shard_tokens` labels.

        Rows of like length come together. Shards of an interrupted run of the same plan are marked as done; those of
        other plans stay, and their rows are left out.
        """
        held = self._held(self._committed)
        wanted = sorted({key: (tokens, key, n) for key, tokens, n in rows if key not in held}.values())
        plan = digest([str(shard_tokens), *(key for _, key, _ in wanted)])
        budget = min(shard_tokens, (2**31 - 1) // self.settings.k)  # Arrow's lists count in int32
        pending = self._pending.keys()
        others = {name for name in pending if self._pending[name]["plan"] != plan}
        shards = self._cut(wanted, others, budget, plan)
        if {shard.name for shard in shards if shard.done} == pending - others:
            return shards
        # since this plan was interrupted, another one has written some of its rows
        return self._cut(wanted, pending, budget, plan)

    def write(self, shard: ShardPlan, entries: Sequence[Entry]) -> None:
        """Put a shard on the disk, with one entry for each of its keys.

        Raises:
            ValueError: the entries are not those that were planned, or hold NaN.
        """
        self._pending[shard.name] = write_shard(self.folder, shard, entries, self.settings)

    def commit(self, versions: Mapping[str, str]) -> None:
        """Make everything that was written part of the cache, and remove what unfinished runs have left.

        Args:
            versions: of the software that made it, by name, for the manifest and the card.
        """
        self._committed |= self._sound(self._sidecars())  # those of other processes too
        self._pending = {}
        shards = write_manifest(self.folder, self.settings, self._committed, dict(versions))
        card = self.folder / CARD
        text = write_card(card.read_text("utf-8") if card.exists() else None, self.settings, shards, versions)
        with replacing(card) as file:
            file.write(text.encode())
        for path in self.folder.iterdir():
            if OURS.fullmatch(path.name) and path.name not in self._committed:
                path.unlink()

    def _require_same(self, theirs: dict[str, Any]) -> None:
        # a fingerprint says more than a path, which may be spelt in two ways
        ours = {k: v for k, v in asdict(self.settings).items() if k not in ("teacher", "teacher_revision")}
        if differing := [f"{k}={theirs.get(k)!r} and not {v!r}" for k, v in ours.items() if theirs.get(k) != v]:
            raise CacheError(
                f"The cache in {self.folder} was made with {', '.join(differing)}: choose another folder, or make "
                "this one with those settings too."
            )

    def _sidecars(self) -> dict[str, dict]:
        """What is said of the shards that no manifest lists as they are now."""
        found = {}
        for path in sorted(self.folder.glob("shard-*.json")):
            try:
                about = unsealed(path)
            except CacheError:
                warnings.warn(f"{path} is damaged: the rows of its shard are missing again.", stacklevel=3)
            else:
                found[about["name"]] = about
        return found

    def _sound(self, shards: dict[str, dict]) -> dict[str, dict]:
        """The shards whose files are whole."""
        unsound = dict(faults(self.folder, list(shards.values()), contents=True, disable=self.disable))
        for name, fault in unsound.items():
            warnings.warn(f"{self.folder / name} {fault}: its rows are missing again.", stacklevel=3)
        return {name: shard for name, shard in shards.items() if name not in unsound}

    def _held(self, names: Collection[str]) -> set[str]:
        """The keys of some of the shards."""
        for name in names:
            if name not in self._keys:
                self._keys[name] = Shard(self.folder / name, self.settings.k).keys.astype("U").tolist()
        return set().union(*(self._keys[name] for name in names))

    def _cut(self, rows: list[tuple[int, str, int]], kept: Collection[str], budget: int, plan: str) -> list[ShardPlan]:
        """The rows that the kept shards lack, cut where the budget is full, under the first names that are free."""
        held, groups, size = self._held(kept), [], budget + 1
        for _, key, n in rows:
            if key in held:
                continue
            size += n
            if size > budget:
                groups.append([])
                size = n
            groups[-1].append((key, n))
        taken = self._committed.keys() | kept
        names = (f"shard-{number:05d}.arrow" for number in range(len(groups) + len(taken)))
        shards = []
        for name, group in zip((name for name in names if name not in taken), groups, strict=False):
            keys, labelled = zip(*group, strict=True)
            done = self._pending.get(name, {}).get("keys") == digest(keys)
            shards.append(ShardPlan(name, keys, labelled, plan, done))
        return shards


class TeacherCache:
    """Reads a cache: a folder, or a dataset on the Hub, which is downloaded. `cache[key]` is the entry of a row.

    Every shard is compared with its sha256 first, or only with its size if `verify` is false. The workers of a data
    loader may get it by fork or by pickle: each maps the shards that it reads.

    Raises:
        CacheError: there is no cache, or a file of it is missing or damaged.
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
        return type(self), (self.folder, False)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The distinct keys that are not there, in order."""
        keys = list(dict.fromkeys(keys))
        if not keys or not self.rows:
            return keys
        wanted = np.array(keys, "S")
        there = self._keys[self._keys.searchsorted(wanted).clip(max=self.rows - 1)] == wanted
        return [key for key, held in zip(keys, there, strict=True) if not held]

    def check(
        self,
        *,
        tokenizer_fingerprint: str | None = None,
        template_fingerprint: str | None = None,
        vocab_size: int | None = None,
        max_length: int | None = None,
    ) -> None:
        """Raise a CacheError unless the cache was made as a run is made; what is None is not compared."""
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
