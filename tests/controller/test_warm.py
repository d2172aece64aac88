"""Phases forked from a process that has imported torch already, beside phases that are started as programs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from builders import START, make_run, seen, sft

from controller.backends.local import process
from controller.backends.local.backend import phase_command
from controller.backends.local.warm import PHASE, Starter, Warm
from controller.plan.decide import Apply, decide
from trainers.contract import JOB_VARIABLE, METRICS_PORT_VARIABLE, TERMINATION_VARIABLE

ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", METRICS_PORT_VARIABLE: "0"}
TASK = [{"synthetic": {"task": "letters", "split": "base", "count": 64}}]


def until(happened: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.05)


def phase(root: Path, steps: int = 2) -> tuple[list[str], dict[str, str], Path]:
    """Command, environment and log of a small training, as the local backend has them."""
    scratch = {
        "hiddenSize": 16, "intermediateSize": 16, "numLayers": 1, "numHeads": 1, "maxPositions": 64,
        "tokenizer": {"kind": "word", "vocabSize": 96, "trainOn": TASK},
    }  # fmt: skip
    spec = {
        "model": {"scratch": scratch},
        "data": {"train": TASK, "maxLength": 32},
        "batchSize": 4,
        "duration": {"maxSteps": steps},
    }
    root.mkdir(parents=True)
    file = {"run": "test", "phase": root.name, "output": str(root), "baseDir": str(root), "spec": spec}
    (root / "phase.json").write_text(json.dumps(file))
    environ = {**ENVIRON, JOB_VARIABLE: str(root), TERMINATION_VARIABLE: str(process.termination_file(root, 1))}
    return [*PHASE, "sft", "--spec", str(root / "phase.json")], environ, process.log_file(root, 1)


def forked(warm: Warm, command: list[str], environ: dict[str, str], log: Path) -> process.Handle:
    found: list[process.Handle | None] = []
    until(lambda: found.append(warm.start(command, environ, log)) or found[-1])
    assert found[-1] is not None
    return found[-1]


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    warm = Warm(ENVIRON)
    yield warm
    warm.close()


def test_a_forked_phase_is_the_started_one_to_the_last_bit(warm: Warm, tmp_path: Path) -> None:
    roots = [tmp_path / where / "run" / "base" for where in ("one", "other")]  # far enough apart not to be reused
    one, other = map(phase, roots)
    assert forked(warm, *one).wait() == 0
    assert process.start(*other).wait() == 0
    weights = [(root / "model" / "model.safetensors").read_bytes() for root in roots]
    assert weights[0] == weights[1]
    assert one[2].read_text() == other[2].read_text(), "what it prints is in its own log"


def test_it_is_found_like_any_phase_and_its_end_is_told(warm: Warm, tmp_path: Path) -> None:
    command, environ, log = phase(tmp_path / "runs" / "long", steps=100_000)
    handle = forked(warm, command, environ, log)
    until((tmp_path / "runs" / "long" / "metrics.jsonl").exists)
    found = process.processes_under(tmp_path / "runs")
    assert handle.pid in {p.pid for p in found}, "by its mark, though it has the environment of another process"
    assert process.processes_under(tmp_path / "runs" / "lon") == []
    assert str(tmp_path / "runs" / "long" / "phase.json") in " ".join(psutil.Process(handle.pid).cmdline())
    assert os.getsid(handle.pid) == handle.pid, "a Ctrl-C at the terminal does not reach it"
    assert handle.poll() is None
    process.kill(found)
    assert handle.wait() == -signal.SIGKILL


def test_a_failure_has_its_status_and_its_word(warm: Warm, tmp_path: Path) -> None:
    command, environ, log = phase(tmp_path / "bad")
    (tmp_path / "bad" / "phase.json").write_text("{}")
    status = forked(warm, command, environ, log).wait()
    failure, message = process.classify(status, tmp_path / "bad", 1)
    assert (status, failure) == (2, "BadInput"), message


def test_when_the_warm_process_is_killed_its_phases_save_and_others_start_without(tmp_path: Path) -> None:
    warm = Warm(ENVIRON)
    command, environ, log = phase(tmp_path / "long", steps=100_000)
    handle = forked(warm, command, environ, log)
    until((tmp_path / "long" / "metrics.jsonl").exists)
    warm._process.kill()
    assert handle.wait() in (-signal.SIGTERM, 143)
    assert (tmp_path / "long" / "checkpoints").exists(), "it was asked to stop, and saved its work"
    assert process.processes_under(tmp_path) == []
    assert warm.start(*phase(tmp_path / "next")) is None
    warm.close()


def test_a_killed_starter_leaves_neither_warm_process_nor_phase(tmp_path: Path) -> None:
    command, environ, log = phase(tmp_path / "long", steps=100_000)
    program = """
import json, sys, time
from pathlib import Path
from controller.backends.local.warm import Warm
command, environ, log = json.loads(sys.stdin.read())
warm = Warm(environ)
while warm.start(command, environ, Path(log)) is None:
    time.sleep(0.1)
print(warm._process.pid, flush=True)
time.sleep(600)
"""
    starter = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRON
    )
    assert starter.stdin is not None and starter.stdout is not None
    starter.stdin.write(json.dumps([command, environ, str(log)]))
    starter.stdin.close()
    pid = int(starter.stdout.readline())
    until((tmp_path / "long" / "metrics.jsonl").exists)
    starter.kill()
    starter.wait()
    until(lambda: not psutil.pid_exists(pid) and not process.processes_under(tmp_path))


@pytest.mark.parametrize(("processes", "forked"), [(1, True), (2, False)])
def test_the_backends_command_is_one_that_a_fork_can_take_the_place_of(processes: int, forked: bool) -> None:
    """Else all phases would be started as programs, and nobody would notice but by the clock."""
    [action] = decide(make_run(sft("base"), template={"procsPerNode": processes}), seen(), START).actions
    assert isinstance(action, Apply)
    command = phase_command(action.job, Path("/phase.json"))
    assert (list(command[: len(PHASE)]) == PHASE) is forked


def test_who_is_started_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of another kind, phases with environments of their own, and threads that a library counts otherwise."""
    made: list[dict[str, str]] = []
    monkeypatch.setattr("controller.backends.local.warm.Warm", made.append)
    started = []
    monkeypatch.setattr(process, "start", lambda command, environ, log: started.append(command))
    starter = Starter(cores=4, gpus=())
    plain = ([*PHASE, "sft"], {"OMP_NUM_THREADS": "1"}, tmp_path)
    others = [
        ([sys.executable, "-m", "trainers.agent"], {"OMP_NUM_THREADS": "1"}, tmp_path, {}),
        (*plain, {"HF_HOME": "/models"}),
        ([*PHASE, "sft"], {"OMP_NUM_THREADS": "2"}, tmp_path, {}),
    ]
    for other in [*others, *others]:
        starter.start(*other)
    starter.start(*plain, {})
    assert made == [], "a run of one phase has no use for it"
    starter.start(*plain, {})
    assert [environ["OMP_NUM_THREADS"] for environ in made] == ["4"]
    with_gpus = Starter(cores=4, gpus=("0",))
    for _ in range(3):
        with_gpus.start(*plain, {})
    assert len(made) == 1
    assert len(started) == 11
