"""The driver of local runs when there is no room to write."""

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest
from builders import diamond, results, seen

from controller import runner, runs_folder
from controller.api.run import AlignmentRun
from controller.api.status import RunStatus
from controller.plan.observed import Observed
from controller.runner import Outcome, Runner

RUN = diamond()


class Finished:
    """A backend in which everything has been done."""

    live_phases = ()

    async def observe(self, run: AlignmentRun) -> Observed:
        return seen(results=results(run, "base", "dpo", "reward", "ppo"))

    def kill_all(self) -> None:
        return


class Said:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def show(self, status: RunStatus) -> None:
        return

    def say(self, text: str) -> None:
        self.lines.append(text)


def drive(monkeypatch: pytest.MonkeyPatch, root: Path, errors: list[OSError]) -> tuple[Outcome, list[str]]:
    """The outcome of a run whose status cannot be written at first."""
    write = runs_folder.write_status

    def failing(*args: Any) -> None:
        if errors:
            raise errors.pop()
        write(*args)

    monkeypatch.setattr(runs_folder, "write_status", failing)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    said = Said()
    backend: Any = Finished()
    return asyncio.run(Runner(RUN, backend, root, said).drive()), said.lines


def test_a_run_waits_for_room_to_write_and_says_so_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = [OSError(errno.ENOSPC, "No space left on device") for _ in range(5)]
    outcome, (line,) = drive(monkeypatch, tmp_path, full)
    assert outcome == Outcome.SUCCEEDED
    assert line.startswith(f"no space left to write in {tmp_path}: ")
    assert line.endswith("bytes are free; the run goes on when there is room")
    assert runs_folder.read_status(tmp_path, RUN.name) is not None


def test_another_error_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output"):
        drive(monkeypatch, tmp_path, [OSError(errno.EIO, "Input/output error")])
