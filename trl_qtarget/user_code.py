"""Functions of the user's own (losses, verifiers, rewards): how a name in a recipe leads to one.

A name is `my_module:function` or `path/to/file.py:function`. Modules are looked for in the working directory and on
the Python path; `~` in a path is the home directory.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import zlib
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType


class NotFound(ValueError):
    """No module or file has the given name; the message is a clause that completes "unknown loss X: ..."."""


def split(name: str) -> tuple[str, str]:
    """`my_module:function` or `file.py:function` as (source, function); of a file alone the function is ""."""
    if name.endswith(".py"):
        return name, ""
    source, _, function = name.rpartition(":")
    return source, function


def load(source: str) -> ModuleType:
    """The module that a dotted name or a path ending in `.py` names; a file is executed once per process.

    Raises:
        NotFound: there is no such module or file. Errors of the user's own code are raised as they are.
    """
    return _load_file(source) if source.endswith(".py") else _import(source)


def _load_file(source: str) -> ModuleType:
    path = Path(source).expanduser().resolve()
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


def _import(source: str) -> ModuleType:
    if not all(part.isidentifier() for part in source.split(".")):
        raise NotFound(f"{source!r} is no name of a module; a file is named by its path, ending in .py")
    search_here()
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name and not f"{source}.".startswith(f"{error.name}."):
            raise  # the user's module exists, and something that it imports does not
        raise NotFound(f"there is no module {source!r} here or on the Python path") from None


def search_here() -> None:
    """Let imports find modules of the working directory, as they do under `python -m` but not in a console script."""
    if not {"", os.getcwd()} & {*sys.path}:
        sys.path.insert(0, os.getcwd())


def file_of(source: str) -> Path | None:
    """The file that a dotted name or a path names, for a fingerprint of its contents; nothing is imported.

    None for what does not exist, and for installed packages: their versions are recorded elsewhere.
    """
    if source.endswith(".py"):
        path = Path(source).expanduser()
        return path if path.is_file() else None
    found, folders, parts = None, [os.getcwd(), *sys.path], source.split(".")
    try:
        for depth in range(1, len(parts) + 1):
            found = PathFinder.find_spec(".".join(parts[:depth]), folders)
            if found is None and depth == 1:
                found = importlib.util.find_spec(parts[0])
            folders = list(found.submodule_search_locations or []) if found else []
    except (ImportError, AttributeError, ValueError):  # the name cannot be one of a module
        return None
    path = Path(found.origin) if found and found.has_location and found.origin else None
    if path is None or not path.is_file() or {"site-packages", "dist-packages"} & {*path.parts}:
        return None
    return path
