"""What a workspace holds, of runs that are gone too: read from the folders alone, in a folder or in an object store.

Whoever may write to the workspace has written it, so nothing is believed but what can be read, and nothing is followed.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar

from controller.api.status import PhaseStatus, RunStatus
from trainers.contract import Progress, Result
from trainers.phase_dir import HISTORY
from trainers.remote.store import Store
from trainers.spec import SpecModel

M = TypeVar("M", bound=SpecModel)
F = TypeVar("F", int, float)

LARGEST = 4 << 20
"""Bytes of a file that is read: a result is some kilobytes."""
LARGEST_FIGURE = 10**15
"""Of bytes, steps or seconds. One that is larger, or negative, was written by nobody who counted, and counts as none."""
MARKS = ("result.json", "identity.json")
"""Files by which a phase's folder is known."""
MARK_OF_ASIDE = re.compile(r"-([0-9a-f]{16}|damaged)(\.\d+)?$")


class Files(Protocol):
    """As much of a workspace as is needed here."""

    def names(self, pattern: str) -> Iterable[str]:
        """Files that match, relative to the workspace."""

    def read(self, name: str) -> bytes | None:
        """None for what is not there, or is no file to be read."""


@dataclass(frozen=True)
class Folder:
    root: Path

    def names(self, pattern: str) -> Iterator[str]:
        return (path.relative_to(self.root).as_posix() for path in self.root.glob(pattern))

    def read(self, name: str) -> bytes | None:
        path = self.root / name
        try:
            # A name may lead anywhere: to a device, to a file of somebody else's.
            inside = path.resolve().is_relative_to(self.root.resolve()) and path.is_file()
            return path.read_bytes() if inside and path.stat().st_size <= LARGEST else None
        except OSError:
            return None


class Bucket:
    """A workspace in an object store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._sizes: dict[str, int] = {}

    def names(self, pattern: str) -> Iterable[str]:
        found = self.store.glob(pattern)
        self._sizes |= {name: thing.size for name, thing in found.items()}
        return found

    def read(self, name: str) -> bytes | None:
        return self.store.read(name) if self._sizes.get(name, 0) <= LARGEST else None


@dataclass(frozen=True)
class HeldPhase:
    """A phase's folder: a result, or work that was not finished."""

    run: str
    name: str
    folder: str
    """Relative to the workspace."""
    aside: bool
    """In the history: of other settings, or of before it was run anew."""
    result: Result | None
    """None: not finished, or damaged."""
    step: int = 0
    """Of work that was not finished."""
    total_steps: int = 0
    known: PhaseStatus | None = None
    """What a run on one machine has said of it."""

    @property
    def type(self) -> str:
        return self.result.type if self.result else (self.known.type if self.known else "")

    @property
    def finished_at(self) -> str:
        """`2026-01-02 03:04`, in UTC; empty if it has not finished."""
        return moment(self.result.finished_at) if self.result else ""

    @property
    def size(self) -> int:
        """Bytes of what it left, as it was written."""
        return sum(artifact.size for artifact in self.result.artifacts.values()) if self.result else 0


@dataclass(frozen=True)
class HeldRun:
    name: str
    phases: tuple[HeldPhase, ...]
    """Those that count, in the order in which they ended; unfinished ones last."""
    aside: tuple[HeldPhase, ...]
    others: tuple[PhaseStatus, ...] = field(default=())
    """Of a run on one machine: phases that have left nothing, failed ones for example."""

    @property
    def finished(self) -> tuple[HeldPhase, ...]:
        return tuple(phase for phase in self.phases if phase.result)

    @property
    def last(self) -> str:
        """When it left its last result."""
        return max((phase.finished_at for phase in (*self.phases, *self.aside)), default="")

    @property
    def seconds(self) -> float:
        """Of work on what counts."""
        return sum(phase.result.seconds for phase in self.finished if phase.result)

    @property
    def size(self) -> int:
        """Bytes, with what was set aside. Results that two runs share are counted in both."""
        return sum(phase.size for phase in (*self.phases, *self.aside))


def holdings(files: Files) -> tuple[HeldRun, ...]:
    """All runs of a workspace, the one that has left something last first."""
    statuses = {PurePosixPath(name).parts[0]: name for name in files.names("*/status.json")}
    known = {run: _read(files, name, RunStatus) or RunStatus() for run, name in statuses.items()}
    found: dict[str, list[HeldPhase]] = {run: [] for run in known}
    for folder in sorted(_folders(files)):
        run = PurePosixPath(folder).parts[0]
        found.setdefault(run, []).append(_phase(files, folder, known.get(run, RunStatus())))
    runs = [_run(run, phases, known.get(run, RunStatus())) for run, phases in found.items()]
    # Names in their order, where nothing tells which is newer.
    return tuple(sorted(sorted(runs, key=lambda run: run.name), key=lambda run: run.last, reverse=True))


def _folders(files: Files) -> set[str]:
    """Of phases, and of what was set aside; not those that a killed process was making."""
    patterns = [f"*/{middle}*/{mark}" for middle in ("", f"{HISTORY}/") for mark in MARKS]
    folders = {PurePosixPath(name).parent for pattern in patterns for name in files.names(pattern)}
    return {str(folder) for folder in folders if not (folder.name.startswith(".") or folder.parts[0].startswith("."))}


def _phase(files: Files, folder: str, status: RunStatus) -> HeldPhase:
    run, *middle, last = PurePosixPath(folder).parts
    found = _read(files, f"{folder}/result.json", Result)
    result = found and _counted(found)
    progress = (_read(files, f"{folder}/progress.json", Progress) if result is None else None) or Progress()
    name = MARK_OF_ASIDE.sub("", last) if middle else last
    known = None if middle else status.phase_status(name)
    return HeldPhase(
        run, name, folder, bool(middle), result, _figure(progress.step), _figure(progress.total_steps), known
    )


def _counted(result: Result) -> Result:
    """Its figures are added up and shown with those of others."""
    artifacts = {n: found.model_copy(update={"size": _figure(found.size)}) for n, found in result.artifacts.items()}
    figures = {"steps": _figure(result.steps), "seconds": _figure(result.seconds)}
    return result.model_copy(update={"artifacts": artifacts, **figures})


def _figure(value: F) -> F:
    return value if 0 <= value <= LARGEST_FIGURE else type(value)(0)


def _run(name: str, phases: Iterable[HeldPhase], status: RunStatus) -> HeldRun:
    ordered = sorted(phases, key=lambda phase: (not phase.finished_at, phase.finished_at))
    own = tuple(phase for phase in ordered if not phase.aside)
    left = {phase.name for phase in own}
    others = tuple(phase for phase in status.phases if phase.name not in left)
    return HeldRun(name, own, tuple(phase for phase in ordered if phase.aside), others)


def _read(files: Files, name: str, kind: type[M]) -> M | None:
    try:
        return kind.model_validate_json(files.read(name) or b"")
    except ValueError:
        return None


def moment(text: str) -> str:
    """A time as a phase has written it."""
    try:
        found = datetime.fromisoformat(text)
        return f"{found.astimezone(UTC):%Y-%m-%d %H:%M}"
    except (ValueError, OverflowError):
        return ""
