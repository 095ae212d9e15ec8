"""The writing end of a teacher cache: which rows are missing, how they are divided into shards, and the commit.

Every file appears under its name only when it is complete and on the disk: first a shard, then its sidecar, at the end
the manifest. However a run is stopped, its finished shards count, and the same run repeated ends with the same bytes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import TEMPORARY, write_text
from ..locking import Held, held
from . import MANIFEST, foreign_file
from .card import write_card
from .fingerprints import digest
from .shards import (
    CacheError,
    Entry,
    Settings,
    Shard,
    ShardPlan,
    faults,
    read_manifest,
    unsealed,
    write_manifest,
    write_shard,
)


CARD = "README.md"
REMOVABLE = re.compile(rf"shard-\d{{5,}}\.(arrow|json)|{TEMPORARY.pattern}")  # all other files are the user's


@contextmanager
def alone(folder: str | Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if it is missing, for the length of the context.

    Two runs that plan at the same time give their shards the same names, and the files and the manifest of the second
    one would replace those of the first. One process of each run holds the folder for all processes of the run. A run
    that ends before its first shard leaves nothing: no settings that would bind the next run, and no new folder.

    Raises:
        CacheError: another run writes into the folder, or the folder holds a manifest that cannot be read.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with held(folder):
            _forget_settings(folder)  # of a run that was killed
            try:
                yield
            finally:
                with suppress(CacheError):
                    _forget_settings(folder)
    except Held as holder:
        raise CacheError(
            f"Another `trl-qtarget cache` writes into {folder} ({holder}): wait until it has ended, or choose another "
            "folder."
        ) from None
    finally:
        if is_new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _forget_settings(folder: Path) -> None:
    """Remove the manifest of a run that has written no shard."""
    manifest = folder / MANIFEST
    if manifest.is_file() and read_manifest(folder)["versions"] is None and not any(folder.glob("shard-*")):
        manifest.unlink()


class CacheWriter:
    """A writer that makes the cache in a folder, or continues the cache that the folder holds.

    Several processes of one run, which holds the folder by `alone`, may write into it: each makes a writer and the
    same plan, writes every n-th shard, and one process commits after all have written. A process must select its
    shards by their position in the plan before it skips those marked `done`: a writer that is made later may see more
    of them done.

    Raises:
        CacheError: the folder holds a cache of other settings, or other files.
    """

    def __init__(self, folder: str | Path, settings: Settings, disable: bool = False):
        self.folder, self.settings, self.disable = Path(folder), settings, disable
        self.folder.mkdir(parents=True, exist_ok=True)
        if strange := foreign_file(self.folder):
            raise CacheError(
                f"The folder {folder} holds {strange} and no {MANIFEST}, so it is no teacher cache: choose another "
                "folder."
            )
        if not (self.folder / MANIFEST).exists():
            write_manifest(self.folder, settings, {}, versions=None)
        manifest = read_manifest(self.folder)
        self._require_same(manifest["settings"])
        sidecars = self._sidecars()
        self._committed = self._sound({s["name"]: s for s in manifest["shards"] if s["name"] not in sidecars})
        self._pending = self._sound(sidecars)
        self._keys: dict[str, list[str]] = {}

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return the distinct keys that no shard holds yet, in their order."""
        held = self._held(self._committed | self._pending)
        return [key for key in dict.fromkeys(keys) if key not in held]

    def plan(self, rows: Iterable[tuple[str, int, int]], shard_tokens: int) -> list[ShardPlan]:
        """Divide the rows that the cache lacks into shards of at most `shard_tokens` labels.

        Rows of like length come together, so that a batch of them needs little padding. Shards that an interrupted run
        of the same plan has written are marked `done`. Shards that interrupted runs of other plans have written are
        kept, and their rows are left out of this plan.

        Args:
            rows: (key, number of tokens, number of labels) of each.
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
        # another plan ran after this one was interrupted and wrote some of its rows: keep the shards of both
        return self._cut(wanted, pending, budget, plan)

    def write(self, shard: ShardPlan, entries: Sequence[Entry]) -> None:
        """Write a planned shard, with one entry for each of its keys.

        Raises:
            ValueError: the entries do not fit the planned rows, or hold NaN.
        """
        self._pending[shard.name] = write_shard(self.folder, shard, entries, self.settings)

    def commit(self, versions: Mapping[str, str]) -> None:
        """List all complete shards in the manifest, renew the card, and remove sidecars and files of killed runs.

        Args:
            versions: of the software that scored, by name, for the manifest and the card.
        """
        self._committed |= self._sound(self._sidecars())  # read again: other processes have written shards too
        self._pending = {}
        shards = write_manifest(self.folder, self.settings, self._committed, dict(versions))
        card = self.folder / CARD
        text = write_card(card.read_text("utf-8") if card.exists() else None, self.settings, shards, versions)
        write_text(card, text)
        for path in self.folder.iterdir():
            if REMOVABLE.fullmatch(path.name) and path.name not in self._committed:
                path.unlink()

    def _require_same(self, made: dict[str, Any]) -> None:
        # the teacher is compared by its fingerprint alone: one model may be named by a path, or by a Hub id
        wanted = {k: v for k, v in asdict(self.settings).items() if k not in ("teacher", "teacher_revision")}
        if differing := [f"{k}={made.get(k)!r} and not {v!r}" for k, v in wanted.items() if made.get(k) != v]:
            raise CacheError(
                f"The cache in {self.folder} was made with {', '.join(differing)}: choose another folder, or run "
                "`trl-qtarget cache` with the settings of this cache."
            )

    def _sidecars(self) -> dict[str, dict]:
        """Read the sidecars of shards that no commit has listed yet; a damaged one is left out with a warning."""
        found = {}
        for path in sorted(self.folder.glob("shard-*.json")):
            try:
                sidecar = unsealed(path)
            except CacheError:
                warnings.warn(f"{path} is damaged: the rows of its shard will be scored again.", stacklevel=3)
            else:
                found[sidecar["name"]] = sidecar
        return found

    def _sound(self, shards: dict[str, dict]) -> dict[str, dict]:
        """Return the shards whose files are as they were written; the others are left out with a warning."""
        unsound = dict(faults(self.folder, list(shards.values()), contents=True, disable=self.disable))
        for name, fault in unsound.items():
            warnings.warn(f"{self.folder / name} {fault}: its rows will be scored again.", stacklevel=3)
        return {name: shard for name, shard in shards.items() if name not in unsound}

    def _held(self, names: Collection[str]) -> set[str]:
        """Return the keys of the named shards."""
        for name in names:
            if name not in self._keys:
                self._keys[name] = Shard(self.folder / name, self.settings.k).keys.astype("U").tolist()
        return set().union(*(self._keys[name] for name in names))

    def _cut(self, rows: list[tuple[int, str, int]], kept: Collection[str], budget: int, plan: str) -> list[ShardPlan]:
        """Divide the rows that the `kept` shards lack, and give each part the first free shard name."""
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
