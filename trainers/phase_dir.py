"""A phase's directory in the workspace: the names of its files, and the results that lie beside. Imports no torch."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trainers.contract import Artifact, Identity, Progress, Result
from trainers.files import LEFTOVER, fsync_directory, link_or_copy, tree_size, write_atomic
from trainers.spec import SpecModel

M = TypeVar("M", bound=SpecModel)


@dataclass(frozen=True)
class PhaseDir:
    """Names of the files in a phase's directory."""

    root: Path

    @property
    def result(self) -> Path:
        return self.root / "result.json"

    @property
    def phase_file(self) -> Path:
        return self.root / "phase.json"

    @property
    def progress(self) -> Path:
        return self.root / "progress.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def identity(self) -> Path:
        """What the work in this directory belongs to (:class:`trainers.contract.Identity`)."""
        return self.root / "identity.json"

    @property
    def wandb(self) -> Path:
        """Id of the Weights & Biases run that this work is logged to."""
        return self.root / "wandb-id"

    def read_result(self) -> Result | None:
        """The result, or None if the phase has not finished here. A damaged file counts as not finished."""
        return _read(self.result, Result)

    def read_progress(self) -> Progress | None:
        return _read(self.progress, Progress)

    def read_identity(self) -> Identity | None:
        """What the unfinished work here belongs to; None if there is none, or none that can be told."""
        return _read(self.identity, Identity)

    @property
    def holds_work(self) -> bool:
        """Whether a phase has left something here, finished or not."""
        return any(path.exists() for path in (self.result, self.identity, self.checkpoints, self.metrics))


def _read(path: Path, kind: type[M]) -> M | None:
    try:
        return kind.model_validate_json(path.read_text())
    # ValidationError and UnicodeDecodeError are ValueErrors.
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def intact(artifact: Artifact, phase_root: Path) -> bool:
    """Whether its files are still there, by their size: hashing a large model at every start would take minutes."""
    path = phase_root / artifact.path
    return path.exists() and artifact.size in (0, tree_size(path))


# ---------------------------------------------------------------- one workspace, many results

STARTERS = ("attempts", "job.json", "phase.json")
"""Names in a phase's directory that its starter writes while, or before, the phase runs."""

HISTORY = ".history"
"""Folder beside the phases where results and unfinished work go when an edit displaces them."""


def history_dir(phase_root: Path, digest: str) -> Path:
    return phase_root.parent / HISTORY / f"{phase_root.name}-{digest[:16]}"


def set_aside(phase_root: Path) -> Path | None:
    """Move what another identity left in a phase's directory to the history. Nothing computed is ever deleted."""
    directory = PhaseDir(phase_root)
    if not directory.holds_work:
        return None
    found = directory.read_result() or directory.read_identity()
    target = history_dir(phase_root, found.digest if found else "damaged")
    if target.exists():
        target = target.with_name(f"{target.name}.{time.time_ns()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(phase_root, target)
    return target


def open_directory(directory: PhaseDir, identity: Identity) -> None:
    """Make the directory this identity's: unfinished work of it stays, anything else goes to the history.

    What belongs to the process that starts the phase (:data:`STARTERS`) stays.
    """
    unfinished = directory.holds_work and directory.read_identity() != identity
    if (unfinished or directory.result.exists()) and (moved := set_aside(directory.root)) is not None:
        directory.root.mkdir(exist_ok=True)
        _hand_over(moved, directory.root)
    directory.root.mkdir(parents=True, exist_ok=True)
    _drop_leftovers(directory.root)
    write_atomic(directory.identity, json.dumps(identity.document()))


def _drop_leftovers(root: Path) -> None:
    """Files that writers of attempts before were killed in: traces may be large. What the starter is writing stays."""
    for path in root.rglob(".*.tmp"):
        written = LEFTOVER.fullmatch(path.name)
        if written and not {written[1], path.relative_to(root).parts[0]} & set(STARTERS):
            path.unlink(missing_ok=True)


def find_finished(workspace: Path, digest: str) -> Iterator[Path]:
    """Directories anywhere in the workspace (any run, or a run's history) whose result has this digest.

    Several may have it: the digest covers what was asked for, and data may have changed between two of them.
    """
    for root in finished_phases(workspace):
        result = PhaseDir(root).read_result()
        if result is not None and result.digest == digest:
            yield root


def finished_phases(workspace: Path) -> Iterator[Path]:
    """Directories with a result, of all runs and their histories; not the copies that a killed process was making."""
    for pattern in ("*/*/result.json", f"*/{HISTORY}/*/result.json"):
        for path in sorted(workspace.glob(pattern)):
            if not path.parent.name.startswith("."):
                yield path.parent


def adopt(finished: Path, phase_root: Path, check: Callable[[], None] = lambda: None) -> None:
    """Give a phase the result of an equal one, by hard links where the file system allows, else by copying.

    Artifacts never change once ``result.json`` stands, so sharing their files is safe. ``check`` raises if it is another
    process's to do by then.
    """
    temporary = phase_root.with_name(f".{phase_root.name}.adopt")
    if temporary.exists():  # of a process that was killed, perhaps with what it had been handed
        phase_root.mkdir(exist_ok=True)
        _hand_over(temporary, phase_root)
        shutil.rmtree(temporary)
    ignored = shutil.ignore_patterns("checkpoints", *STARTERS)
    shutil.copytree(finished, temporary, copy_function=link_or_copy, ignore=ignored)
    check()
    _hand_over(phase_root, temporary)
    set_aside(phase_root)
    shutil.rmtree(phase_root, ignore_errors=True)
    os.replace(temporary, phase_root)
    fsync_directory(phase_root.parent)


def _hand_over(old: Path, new: Path) -> None:
    """Move what belongs to the starter: it may be writing there."""
    for name in STARTERS:
        if (old / name).exists() and not (new / name).exists():
            os.replace(old / name, new / name)
