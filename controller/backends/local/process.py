"""Starting, finding again and ending the processes of one attempt."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import psutil
from pydantic import ValidationError

from controller.api.status import StatusModel
from trainers.contract import FAILURES, JOB_VARIABLE, FailureClass, Termination
from trainers.failures import of_signal
from trainers.files import write_atomic

VMSTAT = Path("/proc/vmstat")

LEASH = Path(__file__).with_name("leash.py")


class JobRecord(StatusModel):
    """`job.json` in a phase's directory: the newest attempt."""

    attempt: int
    digest: str
    pid: int
    created: float
    """The process's start time: a pid alone may be someone else's by now."""
    threads: int
    """Per process. Kept for a phase that goes on, because their number changes the order of floating-point sums."""
    gpus: tuple[str, ...] = ()
    started_at: datetime


def job_file(root: Path) -> Path:
    return root / "job.json"


def log_file(root: Path, attempt: int) -> Path:
    return root / "attempts" / f"{attempt}.log"


def termination_file(root: Path, attempt: int) -> Path:
    return root / "attempts" / f"{attempt}.termination.json"


def attempt_numbers(root: Path) -> list[int]:
    return sorted(int(p.stem) for p in (root / "attempts").glob("*.log") if p.stem.isdigit())


def read_record(root: Path) -> JobRecord | None:
    try:
        return JobRecord.model_validate_json(job_file(root).read_text())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def write_record(root: Path, record: JobRecord) -> None:
    write_atomic(job_file(root), json.dumps(record.document(), indent=1))


def leash() -> list[str]:
    """How a command begins that is asked to stop when this process dies."""
    return [sys.executable, "-I", "-S", str(LEASH), str(os.getpid())]


class Handle(Protocol):
    """Of a started process, as subprocess has it."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


def start(command: Sequence[str], environ: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start in a session of its own, so that a Ctrl-C at the terminal reaches us and not the phase."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            [*leash(), *command],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def record_of(process: Handle, attempt: int, digest: str, threads: int, gpus: tuple[str, ...]) -> JobRecord:
    try:
        created = psutil.Process(process.pid).create_time()
    except psutil.NoSuchProcess:
        created = time.time()
    return JobRecord(
        attempt=attempt,
        digest=digest,
        pid=process.pid,
        created=created,
        threads=threads,
        gpus=gpus,
        started_at=datetime.now(UTC),
    )


# ---------------------------------------------------------------- who is there


def is_alive(record: JobRecord) -> bool:
    try:
        process = psutil.Process(record.pid)
        return abs(process.create_time() - record.created) < 0.01 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def processes_under(directory: Path) -> list[psutil.Process]:
    """Every live process of the phases in a directory: the started ones and all they started in turn.

    Known by an environment variable, because torchrun puts its workers in sessions of their own.
    """
    wanted = str(directory.resolve())
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(JOB_VARIABLE, "")
            if (mark == wanted or mark.startswith(wanted + os.sep)) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess, OSError):
            continue
    return found


# ---------------------------------------------------------------- ending


def ask_to_stop(processes: Iterable[psutil.Process]) -> None:
    _signal(processes, signal.SIGTERM)


def kill(processes: Iterable[psutil.Process]) -> None:
    _signal(processes, signal.SIGKILL)


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def end_all(directory: Path, grace: float) -> int:
    """End every process under a directory: ask, wait, insist. Returns how many there were. Returns only when none is left."""
    processes = processes_under(directory)
    total = len(processes)
    ask_to_stop(processes)
    psutil.wait_procs(processes, timeout=grace)
    while left := processes_under(directory):
        kill(left)
        psutil.wait_procs(left, timeout=5)
    return total


# ---------------------------------------------------------------- what an end means


def classify(status: int, root: Path, attempt: int, starved: bool = False) -> tuple[FailureClass | None, str]:
    """(failure, message) of an attempt that ended: by its own word if it left one, else by its exit status.

    ``starved``: since it began, the kernel has killed a process because the machine was out of memory.
    """
    said = _termination(termination_file(root, attempt))
    if said is not None and said.failure is not None and not (starved and said.failure == FailureClass.INFRASTRUCTURE):
        return said.failure, said.message
    if status == 0:
        return None, ""
    if starved:
        return FailureClass.OUT_OF_MEMORY, "the machine ran out of memory, and the kernel ended a process"
    return _by_status(status, root, attempt)


def oom_kills() -> int:
    """How many processes the kernel has ended for want of memory since it began; 0 where it does not say."""
    try:
        lines = VMSTAT.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _termination(path: Path) -> Termination | None:
    try:
        return Termination.model_validate_json(path.read_text())
    except (FileNotFoundError, ValidationError):
        return None


def _by_status(status: int, root: Path, attempt: int) -> tuple[FailureClass, str]:
    if status < 0:
        return of_signal(-status)
    last = (tail(log_file(root, attempt), 1) or ["nothing was printed"])[0]
    failure = next((f for f, known in FAILURES.items() if known.code == status), FailureClass.INTERNAL)
    return failure, f"exit status {status}: {last.strip()[:500]}"


def tail(path: Path, count: int) -> list[str]:
    """The last non-empty lines of a log, reading only its end."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 64 * 1024, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [line for line in lines if line.strip()][-count:]
