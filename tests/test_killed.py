"""A chain that is killed at any moment: what is left counts as unfinished, and a later run ends as if nothing was."""

import os
import subprocess
import sys
from pathlib import Path

import chain_victim


def test_a_chain_killed_at_any_moment(tmp_path):
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    command = [sys.executable, chain_victim.__file__, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": path}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    first, again = map(int, run.stdout.split())
    assert again > first > 80
