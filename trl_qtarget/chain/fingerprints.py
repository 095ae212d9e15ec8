"""Fingerprints of the files on this machine that a stage reads: models, data, caches, templates, functions, settings.

Only settings that name inputs are looked up on the disk. Any other text may happen to be the name of a folder that
appears later, as `report_to: wandb` does beside the folder `wandb` that this logger makes: if such a folder were an
input, a finished stage would run again.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..locking import LOCK
from ..user_code import file_of, split


READ_WHOLE = 16 * 2**20  # bytes: the fingerprint of a larger file is its size and time instead of its contents
MODEL = "_name_or_path"  # the ending of every setting that names a model
FOLDERS = ("teacher_cache", "chat_template_path", "dataset", "dataset_name")  # settings of a file, folder or Hub id
OF_DATASETS = ("path", "data_files", "data_dir")  # the same within each entry of `datasets`
FORMATS = ("arrow", "audiofolder", "csv", "imagefolder", "json", "parquet", "text", "videofolder", "webdataset", "xml")
FILES = ("accelerate_config", "config_file", "deepspeed", "deepspeed_config_file", "fsdp_config", "accelerator_config")
FUNCTIONS = ("reward_funcs", "loss", "verifier")  # settings that may name a function of the user's
WORKING = ("cache-*.arrow", LOCK)  # files that `datasets` and a cache leave beside the data that they read or write


def of_inputs(settings: Mapping[str, Any], own: Path) -> dict[str, str]:
    """Return the fingerprint of each input of a stage that is on this machine, by the text that names it.

    Args:
        own: the chain's folder, which is left out of a folder of data around it.
    """
    found = {text: _of_path(text, own) for text in _paths(settings)}
    files = {text: text for key in FILES for text in _texts(settings.get(key))}
    files |= {text: str(file_of(_source(text)) or "") for key in FUNCTIONS for text in _texts(settings.get(key))}
    found |= {text: _digest([Path(file)], own) for text, file in files.items() if _is_file(file)}
    return {text: fingerprint for text, fingerprint in found.items() if fingerprint is not None}


def _paths(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts that name models and data."""
    for key, value in settings.items():
        if key in FOLDERS or key.endswith(MODEL):
            yield from _texts(value)
    entries = settings.get("datasets")
    for entry in entries if isinstance(entries, list) else []:
        named = [text for key in OF_DATASETS if isinstance(entry, dict) for text in _texts(entry.get(key))]
        yield from (text for text in named if text not in FORMATS)


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts among the values of mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _source(function: str) -> str:
    """Return the module or file of a function: `module:function`, `file.py:function`, or TRL's `module.function`."""
    return split(function)[0] or function.rpartition(".")[0]


def _of_path(text: str, own: Path) -> str | None:
    """Return the fingerprint of a file, of a folder or of all files that a pattern matches; None if there are none."""
    if not text or len(text) > 4096 or "\n" in text:
        return None
    found = [Path(text)] if _is_input(Path(text)) else []
    if any(sign in text for sign in "*?["):
        found += sorted(Path().glob(text)) if not os.path.isabs(text) else sorted(Path("/").glob(text[1:]))
    return _digest(found, own) if found else None


def _is_input(path: Path) -> bool:
    """Whether the path is a file, or a folder other than the working directory and those above it."""
    try:
        return path.is_file() or (path.is_dir() and not Path.cwd().resolve().is_relative_to(path.resolve()))
    except OSError:
        return False


def _is_file(text: str) -> bool:
    try:
        return bool(text) and Path(text).is_file()
    except (OSError, ValueError):  # a text that is no path, such as DeepSpeed's settings as JSON
        return False


def _digest(paths: Iterable[Path], own: Path) -> str:
    total = hashlib.sha256()
    for path in paths:
        # of a model's folder only the files directly in it count: checkpoints below it come and go
        deep = path.is_dir() and not any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
        files = [path] if path.is_file() else sorted(path.rglob("*") if deep else path.glob("*"))
        around = deep and _is_in(own, path)
        for file in files:
            left_out = any(file.match(name) for name in WORKING) or (around and _is_in(file, own))
            if file.is_file() and not left_out:
                total.update(str(file.relative_to(path)).encode() + b"\0" + _content(file))
    return total.hexdigest()


def _is_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _content(file: Path) -> bytes:
    status = file.stat()
    if status.st_size > READ_WHOLE:
        return f"{status.st_size} {status.st_mtime_ns}".encode()
    return hashlib.sha256(file.read_bytes()).digest()
