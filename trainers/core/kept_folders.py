"""Folders that are kept for whoever needs the same again, until nobody has for a while: who uses one, and when it goes.

Each has its name because of what is in it, so one that is there is whole: it is filled under another name, and loses its
name before it is removed.
"""

import fcntl
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

UNUSED_SECONDS = 7 * 24 * 3600.0
LEAST_FREE = 0.1
"""Share of the disk. With less, folders that no process uses go, the oldest first, however old they are."""

GONE = ".gone"
"""End of what is being removed."""


def hold(folder: Path) -> Path:
    """Say that this process uses a folder, which need not be there yet: it is not removed as long as the process lives."""
    path = _use_mark(folder)
    if folder not in _held or not path.exists():  # somebody may have emptied the place by hand
        path.parent.mkdir(parents=True, exist_ok=True)
        _held[folder] = path.open("ab")
        fcntl.flock(_held[folder], fcntl.LOCK_SH)
    os.utime(path)
    return folder


_held: dict[Path, Any] = {}
"""Open files: closing one would end its lock."""


def drop_unused(root: Path) -> None:
    """Remove folders that no process uses: old ones, and as long as the disk is nearly full the oldest."""
    for left in root.glob(f".*{GONE}"):
        shutil.rmtree(left, ignore_errors=True)
    found = [path for path in root.glob("*") if path.is_dir()]
    for folder in sorted(found, key=_last_used):
        usage = shutil.disk_usage(root)
        if time.time() - _last_used(folder) < UNUSED_SECONDS and usage.free > LEAST_FREE * usage.total:
            break
        _drop(folder)


def _drop(folder: Path) -> None:
    with _use_mark(folder).open("ab") as mark, suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = folder.with_name(f".{folder.name.strip('.')}{GONE}")
        os.replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _use_mark(folder: Path) -> Path:
    """The same for one that is being filled (:func:`trainers.files.new_directory`)."""
    name = folder.name.removeprefix(".").removesuffix(".tmp") if folder.name.startswith(".") else folder.name
    return folder.with_name(f"{name}.used")


def _last_used(folder: Path) -> float:
    mark = _use_mark(folder)
    return (mark if mark.exists() else folder).stat().st_mtime
