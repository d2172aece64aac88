"""The folder that local runs live in: one writer at a time, and what another terminal may read."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from controller.api.run import AlignmentRun
from controller.api.status import RunStatus
from controller.compose import Document
from trainers.files import write_atomic

DEFAULT = Path("runs")


class Unusable(Exception):
    """The workspace cannot be read or written."""


class Busy(Exception):
    """Someone else runs in this workspace."""

    def __init__(self, workspace: Path, pid: int | None) -> None:
        self.pid = pid
        who = f"process {pid}" if pid else "another process"
        super().__init__(f"{workspace} is in use by {who}: one run at a time per workspace (`alignctl stop` ends it)")


def lock_file(workspace: Path) -> Path:
    return workspace / ".lock"


@contextmanager
def locked(workspace: Path) -> Iterator[None]:
    """Hold the workspace. The lock ends with the process however it dies, and children do not inherit it."""
    try:
        workspace.mkdir(parents=True, exist_ok=True)
        fd = os.open(lock_file(workspace), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise Unusable(f"--workspace {workspace}: cannot be written ({error.strerror}); name a folder") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(workspace, holder(workspace)) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def holder(workspace: Path) -> int | None:
    """Process that holds the workspace, or None if nobody does."""
    try:
        with lock_file(workspace).open() as file:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                text = file.read().strip()
                return int(text) if text.isdigit() else 0
    except FileNotFoundError:
        pass
    return None


# ---------------------------------------------------------------- what a run's folder says about it


def status_file(workspace: Path, run: str) -> Path:
    return workspace / run / "status.json"


def write_status(workspace: Path, run: str, status: RunStatus) -> None:
    write_atomic(status_file(workspace, run), json.dumps(status.document(), indent=1))


def read_status(workspace: Path, run: str) -> RunStatus | None:
    try:
        return RunStatus.model_validate_json(status_file(workspace, run).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):  # garbage of any kind counts as absent
        return None


def write_run(workspace: Path, run: AlignmentRun, document: Document) -> None:
    """Keep the run as it was composed, beside what it leaves."""
    write_atomic(workspace / run.name / "run.yaml", yaml.safe_dump(document, sort_keys=False, allow_unicode=True))


def run_names(workspace: Path) -> list[str]:
    """Runs in the workspace, the one touched last first."""
    files = sorted(workspace.glob("*/status.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent.name for path in files]
