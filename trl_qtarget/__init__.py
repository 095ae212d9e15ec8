"""Supervised fine-tuning as a choice of target distribution, as a plugin of TRL."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING


__version__ = "0.1.0"

# Where each public name lives. They are imported when first used, so that the command line answers at once.
_HOMES = {
    "training.config": ["TargetSFTConfig"],
    "training.trainer": ["TargetSFTTrainer"],
    "loss.fused": ["qtarget_loss", "QTargetOutput"],
    "theory.target": ["Target", "Residual", "Tokens", "UNIFORM", "STUDENT", "TEACHER"],
    "theory.presets": ["PRESETS", "preset", "build"],
    "loss.teacher": ["TeacherLogits", "ProjectedLogits", "TopKLogits"],
    "theory.reference": ["reference_loss", "induced_target"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)

if _TYPE_CHECKING:
    from .loss.fused import QTargetOutput, qtarget_loss
    from .loss.teacher import ProjectedLogits, TeacherLogits, TopKLogits
    from .theory.presets import PRESETS, build, preset
    from .theory.reference import induced_target, reference_loss
    from .theory.target import STUDENT, TEACHER, UNIFORM, Residual, Target, Tokens
    from .training.config import TargetSFTConfig
    from .training.trainer import TargetSFTTrainer


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'trl_qtarget' has no attribute {name!r}")
    return getattr(_import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
