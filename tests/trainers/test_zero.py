"""DeepSpeed's ZeRO: what only several processes show."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("zero_processes.py")


@pytest.mark.slow
@pytest.mark.parametrize("cases", [("1", "2", "3s", "3l")], ids=["stages-and-adapters"])
def test_two_processes_train_as_one_does(cases):
    run(cases)


def run(cases: tuple[str, ...]) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(PROGRAM),
        *cases,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
