"""Rows of a table in a file, each as soon as it is done, so that what was measured before a command ended is not lost.

Nothing is taken out of it: a row that is measured again stands behind the one before.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from workers import ROOT


class Kept:
    """Rows by name. Those of other settings, or of other code, are not taken for these."""

    def __init__(self, file: Path, settings: dict[str, Any], resumes: bool) -> None:
        self.file, self.settings, self.resumes = file, settings, resumes

    def row(self, name: str) -> dict[str, Any] | None:
        """The newest one, if rows are to be taken from here."""
        rows = [row["found"] for row in self._rows() if row["name"] == name and row["of"] == self.settings]
        return rows[-1] if rows and self.resumes else None

    def add(self, name: str, found: dict[str, Any]) -> dict[str, Any]:
        with self.file.open("a") as file:
            # In a line of its own, whatever the last one was cut off in.
            file.write("\n" + json.dumps({"name": name, "of": self.settings, "found": found}) + "\n")
        return found

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Whole ones: a line may have been cut off."""
        for line in self.file.read_text().splitlines() if self.file.exists() else ():
            with suppress(json.JSONDecodeError):
                yield json.loads(line)


def code(root: Path = ROOT) -> str:
    """A digest of what is measured, and of what measures: the programs' files as they are."""
    files = sorted(file for folder in ("trainers", "benchmarks") for file in (root / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
