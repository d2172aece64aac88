"""Finished rows on disk, batch by batch, so that a phase that was killed goes on behind the last whole batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainers import jsonl
from trainers.contract import BadInput
from trainers.files import write_atomic


class Parts:
    """``part-N.jsonl`` files, N being the index of the first row; each is written whole or not at all."""

    def __init__(self, root: Path, check: Callable[[list[dict[str, Any]]], None] = lambda rows: None) -> None:
        self.root = root
        self.check = check
        """Raises BadInput for rows that lack what belongs to them."""

    def read(self) -> list[dict[str, Any]]:
        """All rows so far, in order, up to the first gap. A damaged part is one: its rows are made again."""
        rows: list[dict[str, Any]] = []
        for path in self._paths():
            if path.name == _name(len(rows)):
                try:
                    found = list(jsonl.read(path))
                    self.check(found)
                    rows += found
                except BadInput as damage:
                    print(f"made again: {damage}")
                    break
        return rows

    def write(self, first: int, rows: list[dict[str, Any]]) -> Path:
        path = self.root / _name(first)
        write_atomic(path, jsonl.dumps(rows))
        return path

    def _paths(self) -> list[Path]:
        return sorted(self.root.glob("part-*.jsonl"))


def _name(first: int) -> str:
    return f"part-{first:09d}.jsonl"
