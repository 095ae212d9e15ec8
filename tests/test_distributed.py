"""Two processes are one: the same tokens give the same steps however they are spread over ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


WORKER = Path(__file__).with_name("ddp_worker.py")
NAMES = ["loss", "grad_norm", "nll", "qtarget/trust", "qtarget/moved", "qtarget/grad_mass", "num_tokens"]


def steps(loss: str, processes: int, out: Path) -> list[dict]:
    out.mkdir()
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    run = subprocess.run(
        [sys.executable, *launch, WORKER, loss, str(processes), out],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((out / "steps.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("loss", ["nll", "target_sft", "asft", "psft", "critical_token"])
def test_two_processes_equal_one(loss, tmp_path):
    one, two = (steps(loss, n, tmp_path / str(n)) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert [b[n] for n in NAMES] == pytest.approx([a[n] for n in NAMES], rel=1e-4)
