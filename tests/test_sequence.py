"""Ulysses sequence parallelism: losses without a second model are exact on parts of a sequence, others refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


WORKER = Path(__file__).with_name("sequence_worker.py")
EXACT, REFUSED = ["nll", "dft", "eaft", "gem"], ["asft", "iw_sft", "psft"]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each loss logs on one process and on two."""
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("sequence")
    for processes, losses in (("1", EXACT), ("2", EXACT + REFUSED)):
        (out / processes).mkdir()
        launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"] if processes == "2" else []
        run = subprocess.run(
            [sys.executable, *launch, WORKER, processes, *losses, out / processes],
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            capture_output=True, text=True, check=False, timeout=1500,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
    return lambda processes, loss: json.loads((out / processes / f"{loss}.json").read_text())


@pytest.mark.parametrize("loss", EXACT)
def test_two_halves_of_a_sequence_are_one(told, loss):
    one, two = told("1", loss), told("2", loss)
    assert len(two) == 6
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "nll", "qtarget/trust", "entropy"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), name


@pytest.mark.parametrize("loss", REFUSED)
def test_a_second_model_is_refused(told, loss):
    assert "cannot be trained with sequence parallelism" in told("2", loss)
