"""Files of a known format written as JSONL in this project's schemas."""

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainers import jsonl
from trainers.contract import BadInput
from trainers.files import write_atomic
from trainers.fingerprints import source_files
from trainers.formats import FORMATS, renamed, seed_row
from trainers.formats.schemas import Row


@dataclass(frozen=True)
class Imported:
    schema: str
    """The schema that the rows have: `sft`, `preference` or `prompt`."""
    rows: int
    skipped: list[str]
    """Place and fault of every malformed row."""


def import_rows(name: str, pattern: str, target: Path, columns: Mapping[str, str], skip: bool) -> Imported:
    """Write the rows of the files that ``pattern`` means to ``target``, compressed if it ends in .gz.

    All rows have the schema of the first that can be used. Raises BadInput with file and line for a malformed row,
    unless they are to be skipped, and when none is left.
    """
    rows: list[Row] = []
    skipped: list[str] = []
    schema: str | None = None
    sources = source_files(pattern, Path())
    if target.resolve() in {path.resolve() for path in sources}:
        raise BadInput(f"{target} is read and cannot be written: give the target another name")
    for place, raw in (item for path in sources for item in jsonl.items(path)):
        try:
            row = jsonl.parse(raw) if isinstance(raw, bytes) else raw
            found = schema or _schema(row, name, columns)
            rows.append(seed_row(row, found, name, columns))
            schema = found
        except jsonl.Malformed as problem:
            if not skip:
                raise BadInput(f"{place}: {problem}") from problem
            skipped.append(f"{place}: {problem}")
    if schema is None:
        raise BadInput(f"{pattern}: no usable rows{f'; the first: {skipped[0]}' if skipped else ''}")
    text = jsonl.dumps(rows)
    write_atomic(target, gzip.compress(text.encode(), mtime=0) if target.suffix == ".gz" else text)
    return Imported(schema, len(rows), skipped)


def _schema(raw: object, name: str, columns: Mapping[str, str]) -> str:
    """What a row of the format is good for: two answers to compare, one to learn, or none."""
    try:
        row = FORMATS[name](renamed(raw, columns))
    except jsonl.Malformed:
        return "sft"  # which will not do either, and says why
    if "chosen" in row:
        return "preference"
    turns = row.get("messages")
    answered = isinstance(turns, list) and any(isinstance(t, dict) and t.get("role") == "assistant" for t in turns)
    return "sft" if answered or "response" in row else "prompt"
