"""The versions that the package is tested with, and the versions that are installed."""

from __future__ import annotations

import functools
import pkgutil
import platform
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version


# First and last minor release that `make test-versions` runs
TESTED = {"trl": ("1.15", "1.16"), "transformers": ("4.56", "5.24"), "peft": ("0.15", "0.21")}

PACKAGES = ("trl", "transformers", "torch", "accelerate", "datasets", "peft", "deepspeed", "bitsandbytes", "triton")


def tested() -> str:
    """Return the tested range in words, as in "trl 1.15 to 1.16"."""
    return ", ".join(f"{package} {first} to {last}" for package, (first, last) in TESTED.items())


def version(package: str) -> str:
    """Return the installed version of a package, or "not installed"."""
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Return the version of each package that an issue report names."""
    return {package: version(package) for package in PACKAGES}


def outside() -> list[str]:
    """Return the packages whose minor release lies outside the tested range, with their versions."""
    from packaging.version import Version

    found = versions()
    return [
        f"{package} {found[package]}"
        for package, (first, last) in TESTED.items()
        if found[package] != "not installed"
        and not Version(first).release <= Version(found[package]).release[:2] <= Version(last).release
    ]


@functools.cache  # once per process
def warn_if_outside() -> None:
    """Warn, once per process, when an installed version lies outside the tested range."""
    if outside():
        warnings.warn(
            f"trl_qtarget is tested with {tested()}; installed is {', '.join(outside())}: compare `--loss nll` "
            "with TRL's own loss before you rely on it, or install a version of that range.",
            stacklevel=3,
        )


def about() -> list[str]:
    """Return the lines of `trl-qtarget --version`, without importing any of the packages that they name."""
    installed = [f"{package} {found}" for package, found in versions().items()]
    there = f"tested with {tested()}; outside of that: {', '.join(outside()) or 'nothing'}"
    # an import statement would point up, from compat to the whole
    own = pkgutil.resolve_name("trl_qtarget:__version__")
    return [f"trl-qtarget {own}", f"python {platform.python_version()}", *installed, there]


def report() -> None:
    """Print what an issue report needs: the lines of `trl-qtarget --version`, and the machine."""
    print("\n".join([*about(), *_machine()]))  # noqa: T201


def _machine() -> Iterator[str]:
    import torch

    from ..loss.backends import tiles_for

    device = torch.device("cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "cpu")
    yield f"platform {platform.platform()}"
    yield f"CUDA {torch.version.cuda or 'none'}, ROCm {torch.version.hip or 'none'}"
    yield from (f"GPU {i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))
    yield f"device {device.type}, qtarget_backend=auto is {tiles_for('auto', device).__name__.rpartition('.')[2]}"
