"""The key of a stage, made of everything that its result depends on, and the record of the key in the stage's folder.

    key = sha256(command, settings as written, fingerprints of local inputs, keys of the stages that it reads)

`fingerprints` knows which settings name inputs. A name on the Hub is part of the key as a name. Versions of packages
are recorded beside the key and are no part of it, so an upgrade does not throw away hours of training. The chain's own
folder is no part of it either, so that a chain can be moved.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import TEMPORARY, write_text
from .fingerprints import of_inputs
from .nodes import Reference, changed, plain
from .plan import Stage


RECORD = "stage.json"


@dataclass
class Record:
    """The history of a stage. `state` is running, failed or done."""

    key: str
    state: str = "running"
    seconds: float = 0.0  # over all attempts
    attempts: int = 0
    metric: str = ""
    words: list[str] = field(default_factory=list)  # of the command line, after the YAML file
    versions: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        write_text(folder / RECORD, json.dumps(asdict(self), indent=2) + "\n")


def record(folder: Path) -> Record | None:
    """Return the record in a stage's folder, None if there is no readable one."""
    try:
        return Record(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def is_done(stage: Stage, key: str) -> bool:
    """Whether the stage's output exists and was made for this key."""
    last = record(stage.folder)
    return last is not None and (last.key, last.state) == (key, "done") and stage.output.is_dir()


def keys(stages: Iterable[Stage]) -> dict[str, str]:
    """Return each stage's key, by name."""
    known: dict[str, str] = {}
    for stage in stages:
        known[stage.name] = _key(stage, known)
    return known


def _key(stage: Stage, known: Mapping[str, str]) -> str:
    own = {"output_dir", "teacher_cache"} if stage.command == "cache" else {"output_dir"}
    settings = {
        # the key of a stage that is read stands in place of its folder
        key: plain(changed(node, lambda node: node.named(known) if isinstance(node, Reference) else node))
        for key, node in stage.settings.items()
        if key not in own
    }
    content = [stage.command, _with_text_keys(settings), of_inputs(settings, stage.folder.parent)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _with_text_keys(value: Any) -> Any:
    """Return `value` with texts as keys of all mappings in it, which JSON can then sort."""
    if isinstance(value, dict):
        return {str(key): _with_text_keys(inner) for key, inner in value.items()}
    return [_with_text_keys(inner) for inner in value] if isinstance(value, list) else value


# Folders of stages


def is_foreign(stage: Stage) -> bool:
    """Whether the stage's folder holds files and no record, and so was not made by a chain.

    A chain that is killed before the first record leaves an unfinished file, which does not count.
    """
    if record(stage.folder) is not None or not stage.folder.exists():
        return False
    return not stage.folder.is_dir() or any(not TEMPORARY.fullmatch(path.name) for path in stage.folder.iterdir())


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the last complete checkpoint that training can continue from.

    A checkpoint of the last step is left out: from it Trainer takes one more step before it looks at max_steps. One
    with fewer files than the last complete one is left out too: Trainer was killed while it deleted an old checkpoint.
    """
    numbered = sorted(folder.glob("checkpoint-*"), key=lambda path: _number(path.name))
    complete = [(path, state) for path in reversed(numbered) if (state := _trainer_state(path)) is not None]
    files = max((_number_of_files(path) for path, _ in complete[:1]), default=0)
    return next(
        (path for path, state in complete if _number_of_files(path) >= files and _can_continue(path, state)), None
    )


def _number(name: str) -> int:
    tail = name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else -1


def _number_of_files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def _trainer_state(checkpoint: Path) -> dict[str, Any] | None:
    """Return the state that Trainer writes last into a checkpoint; None if the checkpoint is not complete."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def _can_continue(checkpoint: Path, state: Mapping[str, Any]) -> bool:
    """Whether a complete checkpoint has steps left, and holds an optimizer, which `save_only_model` leaves out."""
    if state.get("global_step", 0) >= state.get("max_steps", math.inf):
        return False
    return any(any(checkpoint.glob(name)) for name in ("optimizer*", "global_step*", "pytorch_model_fsdp*"))


def aside(folder: Path) -> Path:
    """Return the name under which the folder of a stage that runs again is kept: NAME.old-1, NAME.old-2, ..."""
    number = 1 + max((_number(path.name) for path in folder.parent.glob(f"{folder.name}.old-*")), default=0)
    return folder.with_name(f"{folder.name}.old-{number}")
