"""Supervised fine-tuning as a choice of target distribution, as a plugin of TRL."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING


__version__ = "0.1.0"

# Where each public name lives. They are imported when first used, so that the command line answers at once.
_HOMES = {
    "config": ["TargetSFTConfig"],
    "trainer": ["TargetSFTTrainer"],
    "loss": ["qtarget_loss", "QTargetOutput"],
    "target": ["Target", "Residual", "Tokens", "UNIFORM", "STUDENT", "TEACHER"],
    "presets": ["PRESETS", "preset", "build"],
    "teachers.base": ["TeacherLogits", "ProjectedLogits", "TopKLogits"],
    "reference": ["reference_loss", "induced_target"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)

if _TYPE_CHECKING:
    from .config import TargetSFTConfig
    from .loss import QTargetOutput, qtarget_loss
    from .presets import PRESETS, build, preset
    from .reference import induced_target, reference_loss
    from .target import STUDENT, TEACHER, UNIFORM, Residual, Target, Tokens
    from .teachers.base import ProjectedLogits, TeacherLogits, TopKLogits
    from .trainer import TargetSFTTrainer


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'trl_qtarget' has no attribute {name!r}")
    return getattr(_import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
