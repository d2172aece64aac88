"""Checkpoints and exports of several processes: handed on to others, cut off by kills, failing in one of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("checkpoint_processes.py")


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["reshard", "kills", "reasons", "damage", "best", "export"])
def test_several_processes(scenario: str, tmp_path: Path):
    """What each scenario checks is said, and asserted, in the script."""
    command = [sys.executable, str(SCRIPT), scenario, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
