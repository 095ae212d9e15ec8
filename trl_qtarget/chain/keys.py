"""What a stage's result depends on, as one key, and the record in its folder that says which key it was made for.

    key = sha256(command, settings as written, fingerprints of local inputs, keys of the stages it reads)

Names of the Hub stand for themselves, and versions of packages are recorded but are no part of the key: an upgrade
does not throw away hours of training. The chain's own folder is no part of it either, so a chain can be moved.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..files import write_text as write
from .plan import Stage, plain


WHOLE = 16 * 2**20  # bytes: files up to here are read, larger ones are told apart by size and time
RECORD = "stage.json"
FUNCTIONS = ("reward_funcs", "loss", "verifier")  # settings that may name a function of a module


@dataclass
class Record:
    """What happened to a stage. `state` is running, failed or done."""

    key: str
    state: str = "running"
    seconds: float = 0.0  # over all attempts
    attempts: int = 0
    metric: str = ""
    words: list[str] = field(default_factory=list)  # of its command, beside its YAML file
    versions: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        write(folder / RECORD, json.dumps(asdict(self), indent=2) + "\n")


def record(folder: Path) -> Record | None:
    """The record in a stage's folder, if there is a readable one."""
    try:
        return Record(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def is_done(stage: Stage, key: str) -> bool:
    """Whether the stage's output is there and was made for this key."""
    found = record(stage.folder)
    return found is not None and (found.key, found.state) == (key, "done") and stage.output.is_dir()


def keys(stages: Iterable[Stage]) -> dict[str, str]:
    """Each stage's key, by name."""
    known: dict[str, str] = {}
    outputs: dict[str, str] = {}  # by the stage's name
    for stage in stages:
        known[stage.name] = _key(stage, outputs, known)
        outputs[stage.name] = str(stage.output)
    return known


def inputs(stage: Stage, outputs: dict[str, str]) -> list[str]:
    """The names of the stages whose `outputs` it reads."""
    texts = [text for node in stage.settings.values() for text in _texts(plain(node))]
    return [name for name, path in outputs.items() if any(_inside(text, path) for text in texts)]


def _key(stage: Stage, outputs: dict[str, str], known: dict[str, str]) -> str:
    own = {"output_dir", "teacher_cache"} if stage.command == "cache" else {"output_dir"}
    settings = {key: plain(node) for key, node in stage.settings.items() if key not in own}
    texts = sorted(set(_texts(settings)))
    local = {text: _fingerprint(text) for text in texts if not any(_inside(text, path) for path in outputs.values())}
    for text in _texts([settings.get(key) for key in FUNCTIONS]):
        file = None if local.get(text) else _module_file(text)
        local |= {text: _digest([file])} if file else {}
    content = [
        stage.command,
        _relocated(settings, {path: known[name] for name, path in outputs.items()}),
        {text: print_ for text, print_ in local.items() if print_},
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _relocated(value: Any, keys_of: dict[str, str]) -> Any:
    """`value` with the paths of earlier stages replaced by their keys."""
    if isinstance(value, dict):
        return {str(key): _relocated(inner, keys_of) for key, inner in value.items()}
    if isinstance(value, list):
        return [_relocated(inner, keys_of) for inner in value]
    if isinstance(value, str):
        for path, key in keys_of.items():
            if _inside(value, path):
                return key + value[len(path) :]
    return value


def _inside(text: str, path: str) -> bool:
    return text == path or text.startswith(path + os.sep)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


# Fingerprints of what lies on this machine


def _fingerprint(text: str) -> str | None:
    """Of the files that a setting names: data, a model, or the module of a function."""
    if not text or len(text) > 4096 or "\n" in text:
        return None
    module, _, _ = text.partition(":")
    dotted = text.rpartition(".")[0] or module
    candidates = [text, module, *(name.replace(".", "/") + ".py" for name in (dotted, module))]
    found = [path for path in map(Path, dict.fromkeys(candidates)) if _is_input(path)]
    if any(sign in text for sign in "*?["):
        found += sorted(Path().glob(text)) if not os.path.isabs(text) else sorted(Path("/").glob(text[1:]))
    return _digest(found) if found else None


def _module_file(text: str) -> Path | None:
    """Where the module of `module.function` or `module:function` lies. Nothing is imported, so parents are searched.

    Installed packages are none of ours: their versions are no part of the key.
    """
    name = text.partition(":")[0] if ":" in text else text.rpartition(".")[0]
    if not name:
        return None  # one of ours or TRL's
    found, folders, parts = None, [str(Path.cwd()), *sys.path], name.split(".")
    try:
        for depth in range(1, len(parts) + 1):
            whole = ".".join(parts[:depth])
            found = PathFinder.find_spec(whole, folders) or (find_spec(whole) if depth == 1 else None)
            folders = list(found.submodule_search_locations or []) if found else []
    except (ImportError, AttributeError, ValueError, KeyError):  # names that are none, namespaces within namespaces
        return None
    file = Path(found.origin) if found and found.has_location and found.origin else None
    return None if file is None or {"site-packages", "dist-packages"} & {*file.parts} or not file.is_file() else file


def _is_input(path: Path) -> bool:
    """A file, or a folder that the chain does not itself run in."""
    try:
        return path.is_file() or (path.is_dir() and not Path.cwd().resolve().is_relative_to(path.resolve()))
    except OSError:
        return False


def _digest(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        # a model's folder is what lies in it directly: checkpoints below it come and go
        deep = path.is_dir() and not any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
        files = [path] if path.is_file() else sorted(path.rglob("*") if deep else path.glob("*"))
        for file in files:
            if file.is_file():
                total.update(str(file.relative_to(path)).encode() + b"\0" + _content(file))
    return total.hexdigest()


def _content(file: Path) -> bytes:
    status = file.stat()
    if status.st_size > WHOLE:
        return f"{status.st_size} {status.st_mtime_ns}".encode()
    return hashlib.sha256(file.read_bytes()).digest()


# Folders


def newest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end, and that training goes on from.

    After the last step Trainer would take one more before it looks at max_steps, so that one is left out.
    """
    numbered = sorted(folder.glob("checkpoint-*"), key=lambda path: _number(path.name))
    return next((path for path in reversed(numbered) if _goes_on(path)), None)


def _number(name: str) -> int:
    tail = name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else -1


def _goes_on(checkpoint: Path) -> bool:
    try:  # the trainer state is written last
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if state.get("global_step", 0) >= state.get("max_steps", math.inf):
        return False
    # without an optimizer it was saved with save_only_model, and training cannot go on from it
    return any(any(checkpoint.glob(name)) for name in ("optimizer*", "global_step*", "pytorch_model_fsdp*"))


def move_aside(folder: Path) -> Path:
    """Keep what was made for other settings: NAME.old-1, NAME.old-2, ..."""
    number = 1 + max((_number(path.name) for path in folder.parent.glob(f"{folder.name}.old-*")), default=0)
    return Path(shutil.move(folder, folder.with_name(f"{folder.name}.old-{number}")))
