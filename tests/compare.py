"""Comparisons whose failure names the quantity that differs, and the modules of the package to look in."""

import pytest
import torch


def close(actual, expected, what: str, where: str, **tolerance) -> None:
    """`torch.testing.assert_close`, whose message begins with the quantity and with `where` it is computed."""
    torch.testing.assert_close(actual, expected, msg=lambda said: f"{what} differs: see {where}\n{said}", **tolerance)


class Step(list):
    """The numbers that one optimizer step has logged, under `names`."""

    def __init__(self, names, numbers):
        super().__init__(numbers)
        self.names = names


def logged(trainer, *names) -> list[Step]:
    """What each optimizer step of a trained trainer has logged under these names."""
    entries = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return [Step(names, (entry[name] for name in names)) for entry in entries]


def same(a: list[Step], b: list[Step], rel: float = 1e-5, where: str = "training/trainer.py, training/scorer.py"):
    """Compare what two runs have logged, step by step and number by number."""
    assert len(a) == len(b) > 0
    for step, (x, y) in enumerate(zip(a, b, strict=True)):
        for name, one, other in zip(x.names, x, y, strict=True):
            said = f"{name} of step {step} differs: {one} and {other}, see {where}"
            assert one == pytest.approx(other, rel=rel), said
