"""The key of a stage, made of everything that its result depends on, and the record of the key in the stage's folder.

    key = sha256(command, settings as written, fingerprints of local inputs, keys of the stages that it reads)

A name on the Hub is part of the key as a name. Versions of packages are recorded beside the key and are no part of it,
so an upgrade does not throw away hours of training. The chain's own folder is no part of it either, so that a chain
can be moved.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_text
from ..user_code import file_of
from .nodes import Reference, changed, plain
from .plan import Stage


READ_WHOLE = 16 * 2**20  # bytes: the fingerprint of a larger file is its size and time instead of its contents
RECORD = "stage.json"
FUNCTIONS = ("reward_funcs", "loss", "verifier")  # settings that may name a function of the user's


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
    local = {text: _fingerprint(text) for text in _texts(settings)}
    for text in _texts([settings.get(key) for key in FUNCTIONS]):
        file = file_of(text.rpartition(":" if ":" in text else ".")[0])
        local[text] = local[text] or (file and _digest([file]))
    content = [stage.command, _with_text_keys(settings), {text: digest for text, digest in local.items() if digest}]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _with_text_keys(value: Any) -> Any:
    """Return `value` with texts as keys of all mappings in it, which JSON can then sort."""
    if isinstance(value, dict):
        return {str(key): _with_text_keys(inner) for key, inner in value.items()}
    return [_with_text_keys(inner) for inner in value] if isinstance(value, list) else value


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts among the values of mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


# Fingerprints of files on this machine


def _fingerprint(text: str) -> str | None:
    """Return the fingerprint of the files that a setting may name, None if there are no such files.

    The text may be a path of data or of a model, a pattern of paths, or a function of a module in this folder.
    """
    if not text or len(text) > 4096 or "\n" in text:
        return None
    module, _, _ = text.partition(":")
    dotted = text.rpartition(".")[0] or module
    candidates = [text, module, *(name.replace(".", "/") + ".py" for name in (dotted, module))]
    found = [path for path in map(Path, dict.fromkeys(candidates)) if _is_input(path)]
    if any(sign in text for sign in "*?["):
        found += sorted(Path().glob(text)) if not os.path.isabs(text) else sorted(Path("/").glob(text[1:]))
    return _digest(found) if found else None


def _is_input(path: Path) -> bool:
    """Whether the path is a file, or a folder other than the working directory and those above it."""
    try:
        return path.is_file() or (path.is_dir() and not Path.cwd().resolve().is_relative_to(path.resolve()))
    except OSError:
        return False


def _digest(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        # of a model's folder only the files directly in it count: checkpoints below it come and go
        deep = path.is_dir() and not any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
        files = [path] if path.is_file() else sorted(path.rglob("*") if deep else path.glob("*"))
        for file in files:
            if file.is_file():
                total.update(str(file.relative_to(path)).encode() + b"\0" + _content(file))
    return total.hexdigest()


def _content(file: Path) -> bytes:
    status = file.stat()
    if status.st_size > READ_WHOLE:
        return f"{status.st_size} {status.st_mtime_ns}".encode()
    return hashlib.sha256(file.read_bytes()).digest()


# Folders of stages


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the last complete checkpoint that training can continue from.

    A checkpoint of the last step is left out: from it Trainer takes one more step before it looks at max_steps.
    """
    numbered = sorted(folder.glob("checkpoint-*"), key=lambda path: _number(path.name))
    return next((path for path in reversed(numbered) if _can_continue(path)), None)


def _number(name: str) -> int:
    tail = name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else -1


def _can_continue(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete, has steps left, and holds an optimizer."""
    try:  # the trainer's state is written last
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if state.get("global_step", 0) >= state.get("max_steps", math.inf):
        return False
    # save_only_model leaves the optimizer out
    return any(any(checkpoint.glob(name)) for name in ("optimizer*", "global_step*", "pytorch_model_fsdp*"))


def move_aside(folder: Path) -> Path:
    """Move the folder of a stage that runs again to NAME.old-1, NAME.old-2, ..., and return its new path."""
    number = 1 + max((_number(path.name) for path in folder.parent.glob(f"{folder.name}.old-*")), default=0)
    return Path(shutil.move(folder, folder.with_name(f"{folder.name}.old-{number}")))
