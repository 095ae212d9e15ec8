"""Files and folders that appear complete or not at all, so that an interrupted run never leaves a partial one."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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


def is_path(name: str) -> bool:
    """Whether the name of a model or data set can only be a path: a name on the Hub is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name


def _beside(path: Path) -> Path:
    """Return a temporary name in the same folder, and so on the same file system, that no other process uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
