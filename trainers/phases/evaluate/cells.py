"""Finished measurements on disk, by what they depend on, so that nothing is measured twice.

A cell's name is the digest of its key: what is measured, the models' digests, the rows, the settings, the seed, the
program. So an evaluation that was killed goes on, and an edited one measures only what is new. Cells are found in the
phase's own directory and in those of other evaluations in the workspace, also where an edit has moved them to the
history.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainers.contract import canonical_json, sha256_text
from trainers.files import write_atomic
from trainers.phase_dir import HISTORY

FOLDER = "cells"

KEPT = 16
"""Values that are remembered, of 512 rows each: the others are read again."""

Key = Mapping[str, Any]


class Cells:
    def __init__(
        self,
        phase_root: Path,
        fetch: Callable[[Path], None] = lambda path: None,
        keep: Callable[[Path], None] = lambda path: None,
    ) -> None:
        """``fetch`` brings a cell from elsewhere if it can, ``keep`` is told of cells that were written."""
        self.fetch, self.keep = fetch, keep
        self.own = phase_root / FOLDER
        self.folders = [self.own, *_others(phase_root)]
        self._known: dict[str, Any] = {}

    def get(self, key: Key) -> Any:
        """The value, or None. A damaged cell counts as not there."""
        name = _name(key)
        if name not in self._known:
            if not any((folder / name).exists() for folder in self.folders):
                self.fetch(self.own / name)
            for folder in self.folders:
                value = _read(folder / name, key)
                if value is not None:
                    self.put(key, value, write=folder != self.own)
                    break
        return self._known.get(name)

    def put(self, key: Key, value: Any, write: bool = True) -> None:
        """Remember a value; it must be JSON, finite, and not null."""
        name = _name(key)
        self._known[name] = value
        if len(self._known) > KEPT:
            del self._known[next(iter(self._known))]
        if write:
            write_atomic(self.own / name, json.dumps({"key": key, "value": value}, allow_nan=False))
            self.keep(self.own / name)


def _name(key: Key) -> str:
    return f"{key['kind']}-{sha256_text(canonical_json(key))[:32]}.json"


def _read(path: Path, key: Key) -> Any:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        same = document["key"] == json.loads(canonical_json(key))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # of whatever kind the damage is
    value = document.get("value")
    return value if same and not_finite(value) is None else None


def not_finite(value: Any) -> float | None:
    """The first number in a JSON value that is none (NaN, infinity), or None."""
    if isinstance(value, float):
        return None if math.isfinite(value) else value
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((found for item in inside if (found := not_finite(item)) is not None), None)


def _others(phase_root: Path) -> Iterator[Path]:
    """Cells of other evaluations in the workspace, which lies two levels above a phase."""
    workspace = phase_root.resolve().parent.parent
    for pattern in (f"*/*/{FOLDER}", f"*/{HISTORY}/*/{FOLDER}"):
        yield from sorted(path for path in workspace.glob(pattern) if path != phase_root.resolve() / FOLDER)
