"""A process that ends ends the others soon, and what is said of it all is what happened first."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed.cells import data
from distributed.conftest import write

from trainers.contract import FAILURES, FailureClass

SCRIPT = Path(__file__).with_name("dying.py")
SECONDS = 30
"""From the first end to the launcher's. Starting is not in it, which takes as long as the machine is busy."""

ENDS = {
    "killed": (["1=SIGKILL"], "Infrastructure", "rank 1: killed by SIGKILL"),
    "the first one killed": (["0=SIGKILL"], "Infrastructure", "rank 0: killed by SIGKILL"),
    "crashed": (["1=SIGSEGV"], "Internal", "rank 1: crashed with SIGSEGV"),
    "bad input in one": (["1=BadInput"], "BadInput", "of rank 1"),
    "out of memory in one": (["1=OutOfMemoryError"], "OutOfMemory", "OutOfMemoryError: of rank 1"),
    "both alike, the second one first": (["0=Infrastructure@0.5", "1=Infrastructure"], "Infrastructure", "of rank 1"),
    "both, the cause as the last": (["0=Infrastructure", "1=BadInput@0.5"], "BadInput", "of rank 1"),
    "both, one killed after a mistake": (["0=BadInput", "1=SIGKILL@0.5"], "BadInput", "of rank 0"),
}
ALWAYS = {("fsdp", "killed")}
"""The others run with ``make test-distributed``."""

CELLS = [
    pytest.param(strategy, end, marks=[] if (strategy, end) in ALWAYS else pytest.mark.distributed)
    for strategy in ("ddp", "fsdp")
    for end in ENDS
]


@pytest.mark.parametrize(("strategy", "end"), CELLS)
def test_the_reason_is_that_of_the_process_that_failed_first(strategy, end, tiny_model_dir, tmp_path):
    dying, failure, message = ENDS[end]
    file = phase_file(tmp_path, tiny_model_dir, strategy)
    launcher = [sys.executable, "-m", "trainers.agent", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    word = tmp_path / "word"
    environment = os.environ | {"ALIGNMENT_METRICS_PORT": "0", "ALIGNMENT_TERMINATION_LOG": str(word)}
    found = subprocess.run(
        [*launcher, "sft", str(file), *dying], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    took = time.time() - file.with_suffix(".died").stat().st_mtime
    said = json.loads(word.read_text())
    assert (said["failure"], said["message"][: len(message)]) == (failure, message), found.stderr[-4000:]
    assert took < SECONDS, found.stderr[-4000:]
    codes = {FAILURES[FailureClass(name)].code for name in (failure, "Infrastructure")}
    assert found.returncode in codes, "the second is what the others met"


def phase_file(folder: Path, model: Path, strategy: str) -> Path:
    """Of steps that end too late for any of these ends."""
    rows = {"train": [data("demonstrations", 48)], "maxLength": 64}
    steps = {"batchSize": 8, "duration": {"maxSteps": 400}, "checkpoint": {"everySteps": 1}}
    spec = {"model": {"source": str(model)}, "data": rows, "parallel": {"strategy": strategy}, **steps}
    return write(folder / "sft.yaml", folder / "run" / "sft", spec)
