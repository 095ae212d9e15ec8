"""Load functions that users write themselves: losses, verifiers, rewards.

A function is named `my_module:function` or `path/to/file.py:function`. Modules are looked up in the working directory
and on the Python path; `~` at the start of a path is the home directory.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
import zlib
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType


class NotFound(ValueError):
    """No module or file has the given name; the message is a clause that completes "unknown loss X: ..."."""


def split(name: str) -> tuple[str, str]:
    """Split `my_module:function` or `file.py:function` into source and function, which is "" for a file alone."""
    if name.endswith(".py"):
        return name, ""
    source, _, function = name.rpartition(":")
    return source, function


def load(source: str) -> ModuleType:
    """Import the module that a dotted name or a path ending in `.py` names; a file is executed once per process.

    Raises:
        NotFound: no module or file has that name. Errors of the user's own code are raised unchanged.
    """
    return _load_file(source) if source.endswith(".py") else _import(source)


def _load_file(source: str) -> ModuleType:
    path = _path(source).resolve()
    name = f"trl_qtarget_user_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise NotFound(f"there is no file {source}")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _path(source: str) -> Path:
    return Path(os.path.expanduser(source))  # Path.expanduser raises for a user without a home


def _import(source: str) -> ModuleType:
    if not source or source.startswith(".") or {"/", "\\"} & {*source}:
        raise NotFound(f"{source!r} is not the name of a module; a file is named by its path, ending in .py")
    search_here()
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name and not f"{source}.".startswith(f"{error.name}."):
            raise  # the user's module exists, but a module that it imports does not
        raise NotFound(f"there is no module {source!r} here or on the Python path") from None


def search_here() -> None:
    """Let imports find modules of the working directory, as under `python -m` but not in a console script."""
    if not {"", os.getcwd()} & {*sys.path}:
        sys.path.insert(0, os.getcwd())


def file_of(source: str) -> Path | None:
    """Find the file that `load(source)` would execute, without importing anything, to fingerprint its contents.

    Returns None for a source that does not exist, and for an installed package, whose version is recorded elsewhere.
    """
    if source.endswith(".py"):
        path = _path(source)
        return path if path.is_file() else None
    found, folders = None, [os.getcwd(), *sys.path]
    try:
        for depth, part in enumerate(source.split(".")):
            # the last part alone: with the whole name, a namespace package would look its parent up in sys.modules
            found = PathFinder.find_spec(part, folders)
            if found is None and depth == 0:
                found = importlib.util.find_spec(part)  # also asks the import hooks of editable installs
            folders = list(found.submodule_search_locations or []) if found else []
    except (ImportError, AttributeError, ValueError):  # the name cannot be a module's
        return None
    path = Path(found.origin) if found and found.has_location and found.origin else None
    if path is None or not path.is_file() or {"site-packages", "dist-packages"} & {*path.parts}:
        return None
    return path


def told(error: BaseException, file: str | Path | None) -> str:
    """Describe an error of the user's code in one line: type, message, and the last line of `file` that it passed.

    Without a file, or if the error did not pass it, the line is the one that raised the error.
    """
    own = Path(file).resolve() if file is not None else None
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename is not None:
        frames.append((error.filename, error.lineno))
    inside = [frame for frame in frames if own is not None and Path(frame[0]).resolve() == own]
    name, line = (inside or frames or [("", None)])[-1]
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    where = f" (line {line} of {name})" if line is not None else ""
    return f"{type(error).__name__}{f': {message}' if message else ''}{where}"
