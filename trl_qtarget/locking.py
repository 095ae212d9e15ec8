"""A lock on a folder: one run at a time writes into it, and another one is told which process that is."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import socket
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO


LOCK = ".lock"
FAR = 2**30  # the byte that Windows locks: it forbids others to read a locked byte, and the first ones name the holder
IN_USE = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)


class Held(RuntimeError):
    """A folder that another process holds; the message is `process 12 on HOST, since TIME`."""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder, which must exist, for the length of the context.

    The operating system holds the lock and releases it when this process ends, even by `kill -9`: a lock file that is
    left behind locks nothing, and the next holder takes it over. On a file system without locks the context warns and
    holds nothing.

    Raises:
        Held: another process holds the folder.
        OSError: the folder cannot be written.
    """
    path = folder / LOCK
    file = _take(path)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {_now()}\n".encode())
        file.flush()
        yield
    finally:
        try:
            path.unlink(missing_ok=True)  # while it is locked: afterwards it may be another process's
        except PermissionError:  # Windows removes no open file
            file.close()
            with contextlib.suppress(OSError):
                path.unlink()
        file.close()


def _take(path: Path) -> BinaryIO:
    """Open a lock file and lock it.

    Raises:
        Held: another process has locked the file; the message is what that process wrote into it.
    """
    while True:
        file = open(path, "a+b")  # noqa: SIM115, the caller closes it
        if not _locked(file):
            file.seek(0)
            holder = file.read().decode(errors="replace").strip()
            file.close()
            raise Held(holder or "another process")
        if _still_there(file, path):
            return file
        file.close()  # the holder before has removed the file that was opened: a later process would lock another one


def _locked(file: BinaryIO) -> bool:
    """Lock an open file without waiting; return whether this succeeded."""
    try:
        _lock(file)
    except OSError as error:
        if error.errno in IN_USE:
            return False
        warnings.warn(
            f"The file system of {file.name} has no locks ({error.strerror}): make sure that no second run writes "
            "into this folder.",
            stacklevel=5,
        )
    return True


def _lock(file: BinaryIO) -> None:
    try:
        import fcntl
    except ImportError:
        windows: Any = importlib.import_module("msvcrt")
        os.lseek(file.fileno(), FAR, os.SEEK_SET)
        windows.locking(file.fileno(), windows.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _still_there(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _now() -> str:
    return datetime.now().astimezone().isoformat(" ", "seconds")
