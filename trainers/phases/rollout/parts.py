"""Finished rows on disk, batch by batch, so that a phase that was killed goes on behind the last whole batch."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainers import jsonl
from trainers.contract import BadInput
from trainers.files import discard, write_atomic

NAME = re.compile(r"part-(\d+)-(\d+)\.jsonl")


class Parts:
    """``part-FIRST-LAST.jsonl`` files of the responses from FIRST on and before LAST; each is written whole or not at all.

    One may have fewer rows than that: not every prompt can be used.
    """

    def __init__(self, root: Path, check: Callable[[list[dict[str, Any]]], None] = lambda rows: None) -> None:
        self.root = root
        self.check = check
        """Raises BadInput for rows that lack what belongs to them."""

    def done(self) -> int:
        """The first response that is in no part. A damaged part, and those behind a gap, are removed and made again."""
        last = 0
        for path, first, behind in self._paths():
            if first == last and self._is_whole(path):
                last = behind
            else:
                discard(path)
        return last

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows, in order."""
        for path, _, _ in self._paths():
            yield from jsonl.read(path)

    def _is_whole(self, path: Path) -> bool:
        try:
            self.check(list(jsonl.read(path)))
        except BadInput as damage:
            print(f"made again: {damage}")
            return False
        return True

    def write(self, first: int, last: int, rows: list[dict[str, Any]]) -> Path:
        path = self.root / f"part-{first:09d}-{last:09d}.jsonl"
        write_atomic(path, jsonl.dumps(rows))
        return path

    def _paths(self) -> list[tuple[Path, int, int]]:
        """(file, first, last) in order."""
        found = [(path, NAME.fullmatch(path.name)) for path in sorted(self.root.glob("part-*.jsonl"))]
        return [(path, int(match[1]), int(match[2])) for path, match in found if match]
