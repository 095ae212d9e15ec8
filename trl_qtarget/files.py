"""Files and folders that appear complete or not at all, so that an interrupted run never leaves a partial one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


CONFIGS = ("config.json", "adapter_config.json")  # a folder with one of these and weights is a model
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")  # names of unfinished files and folders, which a killed run leaves


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new version of `path` for writing; it replaces the old one when the block ends without an error.

    The contents and the folder entry are on the disk before the block is left, so a file that is written later can
    rely on this one after a power failure. After an error the old version stays and the new one is deleted.
    """
    temporary = _beside(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # other systems cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8 and create the folder around it; an interrupted call leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `path` when the block ends without an error, else it is deleted.

    Raises:
        OSError: `path` exists and is not an empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _beside(path)
    unfinished.mkdir()
    try:
        yield unfinished
        if path.is_dir():
            path.rmdir()  # refuses a folder with files in it
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextlib.contextmanager
def whole_model(folder: Path, writes: bool) -> Iterator[Path]:
    """Yield a subfolder to save a model into; its files move up into `folder` when the block ends without an error.

    `folder` may hold other files, such as checkpoints, which stay. The files of a model that is there are removed
    first, and the configuration of the new one comes last: at no time does the folder hold parts of a model that count
    as a whole one.

    writes: whether this process moves the files; several processes may save into the subfolder, one moves
    """
    unfinished = folder / ".unfinished_model"
    if writes:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a save that was killed
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if not writes or not unfinished.is_dir():
        return
    remove_model(folder)
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name in CONFIGS):
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        path.replace(folder / path.name)
    unfinished.rmdir()


def remove_model(folder: Path) -> None:
    """Remove configuration and weights of a model from a folder; without the first the rest counts as no model."""
    configs = [folder / name for name in CONFIGS]
    for file in [*configs, *folder.glob("*.safetensors*"), *folder.glob("*model*.bin*")]:
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def no_empty_folder(path: Path) -> Iterator[None]:
    """Remove `path`, and the folders above it, if the block makes them and then fails with nothing in them."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # something is in it
                folder.rmdir()
        raise


def no_folder(path: Path) -> str | None:
    """Say why `path` is no folder that can be written or made, None if it is one or can be made."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        return f"{there} is a file"
    return None if os.access(there, os.W_OK) else f"{there} is read-only"


def holds_model(folder: Path) -> bool:
    """Whether the folder holds a finished model; checkpoints in folders below it do not count."""
    weights = [*folder.glob("*.safetensors"), *folder.glob("*model*.bin")]
    return bool(weights) and any((folder / file).is_file() for file in CONFIGS)


def cut_weights(folder: Path) -> str | None:
    """Describe a weights file of the folder that is missing or shorter than its header says; None if all are whole.

    An interrupted copy or download leaves such a file, and a loader would say only that it is invalid.
    """
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        try:
            with open(file, "rb") as opened:
                (length,) = struct.unpack("<Q", opened.read(8))
                header = json.loads(opened.read(length) if length <= size else b"")
            needed = (
                8 + length + max((t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0)
            )
        except (struct.error, ValueError, LookupError, TypeError, AttributeError):
            return f"{file} is cut off or no safetensors file ({size} bytes)"
        if size < needed:
            return f"{file} is cut off: {size} of {needed} bytes are there"
    return next((f"{file} is missing" for file in _shards(folder) if not file.is_file()), None)


def _shards(folder: Path) -> list[Path]:
    """Return the weights files that an index in the folder names."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []


def is_path(name: str) -> bool:
    """Whether the name of a model or data set can only be a path: a name on the Hub is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name


def _beside(path: Path) -> Path:
    """Return a temporary name in the same folder, and so on the same file system, that no other process uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
