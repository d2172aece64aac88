"""A process that ends ends the others soon, and what is said of it all is what happened first."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from distributed.cells import data
from distributed.conftest import write

from trainers.contract import FAILURES, FailureClass

SCRIPT = Path(__file__).with_name("dying.py")
SECONDS = 60
"""From the first end to the launcher's: 3 on an idle machine, and no process has to be killed, which torchrun does after 30."""
FROZEN = 60
"""More for one that is missed first, and then does not end when it is asked to."""

ENDS = {
    "killed": (["1=SIGKILL"], "Infrastructure", "rank 1: killed by SIGKILL"),
    "the first one killed": (["0=SIGKILL"], "Infrastructure", "rank 0: killed by SIGKILL"),
    "frozen": (["1=SIGSTOP"], "Infrastructure", "rank 1 has given no sign of life for 20 s"),
    "the first one frozen": (["0=SIGSTOP"], "Infrastructure", "rank 0 has given no sign of life for 20 s"),
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
    for strategy, ends in {"ddp": ENDS, "fsdp": ENDS, "deepspeed": ["killed", "frozen", "bad input in one"]}.items()
    for end in ends
]


@pytest.mark.parametrize(("strategy", "end"), CELLS)
def test_the_reason_is_that_of_the_process_that_failed_first(strategy, end, tiny_model_dir, tmp_path):
    dying, failure, message = ENDS[end]
    file = phase_file(tmp_path, tiny_model_dir, strategy)
    launcher = start(file, *dying)
    printed = launcher.communicate(timeout=900)[0]
    took = time.time() - file.with_suffix(".died").stat().st_mtime
    said = json.loads(file.with_suffix(".word").read_text())
    assert (said["failure"], said["message"][: len(message)]) == (failure, message), printed[-4000:]
    assert took < SECONDS + (FROZEN if "frozen" in end else 0), printed[-4000:]
    assert ("forcefully exiting" in printed) is ("frozen" in end), printed[-4000:]
    codes = {FAILURES[FailureClass(name)].code for name in (failure, "Infrastructure")}
    assert launcher.returncode in codes, "the second is what the others met"
    assert failure == "Internal" or "\nInternal: " not in printed, "nobody meets it in words that are not known"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("begun", "message"), [(True, "stopped after step"), (False, "ended by SIGTERM before it could")]
)
def test_a_launcher_that_is_asked_to_stop_passes_it_on_and_says_so(begun, message, tiny_model_dir, tmp_path):
    file = phase_file(tmp_path, tiny_model_dir, "fsdp")
    launcher = start(file)
    saved = tmp_path / "run" / "sft" / "checkpoints" / "step-1"
    deadline = time.monotonic() + 200
    while not (saved.exists() if begun else children(launcher.pid)):
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    launcher.send_signal(signal.SIGTERM)
    printed = launcher.communicate(timeout=900)[0]
    said = json.loads(file.with_suffix(".word").read_text())
    assert (said["failure"], said["message"][: len(message)]) == ("Interrupted", message), printed[-4000:]
    assert launcher.returncode == 143


def children(process: int) -> list[psutil.Process]:
    return psutil.Process(process).children()


def start(file: Path, *dying: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "trainers.agent",
        "--standalone",
        "--nproc-per-node=2",
        str(SCRIPT),
        "sft",
        str(file),
    ]
    environment = os.environ | {
        "ALIGNMENT_METRICS_PORT": "0",
        "ALIGNMENT_TERMINATION_LOG": str(file.with_suffix(".word")),
    }
    return subprocess.Popen(
        [*command, *dying], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def phase_file(folder: Path, model: Path, strategy: str) -> Path:
    """Of steps that end too late for any of these ends."""
    rows = {"train": [data("demonstrations", 48)], "maxLength": 64}
    steps = {"batchSize": 8, "duration": {"maxSteps": 400}, "checkpoint": {"everySteps": 1}}
    spec = {"model": {"source": str(model)}, "data": rows, "parallel": {"strategy": strategy}, **steps}
    return write(folder / "sft.yaml", folder / "run" / "sft", spec)
