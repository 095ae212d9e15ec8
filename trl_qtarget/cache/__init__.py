"""The offline teacher on disk: its files, how a sequence finds its row in them, and the collator that reads rows.

May import `data`, `loss`, `theory`, `files` and `locking`. Only `offline`, and `sequences` through `theory.reference`,
load torch.
"""

from pathlib import Path

from ..files import TEMPORARY
from ..locking import LOCK


MANIFEST = "manifest.json"  # the file that marks a folder as a cache; named here because `shards` imports Arrow


def foreign_file(folder: Path) -> str | None:
    """Return the name of a file in a folder that is no cache, None if a cache can be made there.

    A lock or an unfinished file, which a run killed at its start has left, does not count.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if MANIFEST in names:
        return None
    return next((name for name in names if name != LOCK and not TEMPORARY.fullmatch(name)), None)
