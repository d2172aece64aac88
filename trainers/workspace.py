"""The workspace: names of the files in a phase's directory, and the results that lie beside. Imports no torch."""

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainers.contract import Artifact, Progress, Result
from trainers.files import fsync_directory, link_or_copy, tree_size, write_atomic


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
        """Digest that unfinished work in this directory belongs to."""
        return self.root / "digest"

    def read_result(self) -> Result | None:
        """The result, or None if the phase has not finished here. A damaged file counts as not finished."""
        try:
            return Result.model_validate_json(self.result.read_text())
        except (
            FileNotFoundError,
            NotADirectoryError,
            ValueError,
        ):  # ValidationError and UnicodeDecodeError are ValueErrors
            return None

    def read_progress(self) -> Progress | None:
        try:
            return Progress.model_validate_json(self.progress.read_text())
        except (
            FileNotFoundError,
            NotADirectoryError,
            ValueError,
        ):  # ValidationError and UnicodeDecodeError are ValueErrors
            return None


def intact(artifact: Artifact, phase_root: Path) -> bool:
    """Whether its files are still there, by their size: hashing a large model at every start would take minutes."""
    path = phase_root / artifact.path
    return path.exists() and artifact.size in (0, tree_size(path))


# ---------------------------------------------------------------- one workspace, many results

HISTORY = ".history"
"""Folder beside the phases where results and unfinished work go when an edit displaces them."""


def history_dir(phase_root: Path, digest: str) -> Path:
    return phase_root.parent / HISTORY / f"{phase_root.name}-{digest[:16]}"


def set_aside(phase_root: Path) -> Path | None:
    """Move what another digest left in a phase's directory to the history. Nothing computed is ever deleted."""
    directory = PhaseDir(phase_root)
    if not directory.identity.exists() and not directory.result.exists():
        return None
    result = directory.read_result()
    unfinished = directory.identity.read_text().strip() if directory.identity.exists() else "damaged"
    digest = result.digest if result else unfinished
    target = history_dir(phase_root, digest)
    if target.exists():
        target = target.with_name(f"{target.name}.{int(time.time())}")
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(phase_root, target)
    return target


def open_directory(directory: PhaseDir, digest: str) -> None:
    """Make the directory this digest's: unfinished work of the same digest stays, anything else goes to the history."""
    unfinished = directory.identity.exists() and directory.identity.read_text().strip() != digest
    if unfinished or directory.result.exists():
        set_aside(directory.root)
    directory.root.mkdir(parents=True, exist_ok=True)
    write_atomic(directory.identity, digest)


def find_finished(workspace: Path, digest: str) -> Iterator[Path]:
    """Directories anywhere in the workspace (any run, or a run's history) whose result has this digest.

    Several may have it: the digest covers what was asked for, and data may have changed between two of them.
    """
    for pattern in ("*/*/result.json", f"*/{HISTORY}/*/result.json"):
        for path in sorted(workspace.glob(pattern)):
            result = PhaseDir(path.parent).read_result()
            if result is not None and result.digest == digest:
                yield path.parent


def adopt(finished: Path, phase_root: Path) -> None:
    """Give a phase the result of an equal one, by hard links where the file system allows, else by copying.

    Artifacts never change once ``result.json`` stands, so sharing their files is safe.
    """
    temporary = phase_root.with_name(f".{phase_root.name}.{os.getpid()}.adopt")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(
        finished, temporary, copy_function=link_or_copy, ignore=shutil.ignore_patterns("checkpoints", "attempts")
    )
    set_aside(phase_root)
    shutil.rmtree(phase_root, ignore_errors=True)
    os.replace(temporary, phase_root)
    fsync_directory(phase_root.parent)
