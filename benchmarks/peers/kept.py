"""Rows of a table in a file, each as soon as it is done, so that what was measured before a command ended is not lost."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workers import ROOT


class Kept:
    """Rows by name. Those of other settings, or of other code, are not taken for these."""

    def __init__(self, file: Path, settings: dict[str, Any], resumes: bool) -> None:
        self.file, self.settings = file, settings
        if not resumes:
            file.unlink(missing_ok=True)

    def row(self, name: str) -> dict[str, Any] | None:
        return next((row["found"] for row in self._rows() if row["name"] == name and row["of"] == self.settings), None)

    def add(self, name: str, found: dict[str, Any]) -> dict[str, Any]:
        with self.file.open("a") as file:
            file.write(json.dumps({"name": name, "of": self.settings, "found": found}) + "\n")
        return found

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Whole lines: the last one may be torn."""
        text = self.file.read_text() if self.file.exists() else ""
        yield from (json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n"))


def code(root: Path = ROOT) -> str:
    """A digest of what is measured, and of what measures: the programs' files as they are."""
    files = sorted(file for folder in ("trainers", "benchmarks") for file in (root / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
