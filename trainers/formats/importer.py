"""Files of a known format written as JSONL in this project's schemas."""

import gzip
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

from trainers import json_text, jsonl
from trainers.contract import BadInput
from trainers.files import replaced
from trainers.fingerprints import source_files
from trainers.formats import FORMATS, renamed, seed_row
from trainers.formats.schemas import ASKING, Row

RICHEST = ("preference", "sft", "prompt")
"""Schemas by what they keep of a row."""


@dataclass(frozen=True)
class Imported:
    schema: str
    """The schema that the rows have: `sft`, `preference` or `prompt`."""
    rows: int
    skipped: list[str]
    """Place and fault of every malformed row."""


def import_rows(name: str, pattern: str, target: Path, columns: Mapping[str, str], skip: bool) -> Imported:
    """Write the rows of the files that ``pattern`` means to ``target``, compressed if it ends in .gz.

    The files are read twice, as they may be larger than memory. All rows have one schema, which keeps the most that any
    of them says: preferences, else answers. A row without is malformed then. Raises BadInput with file and line for a
    malformed row, unless they are to be skipped, and when none is left.
    """
    skipped: list[str] = []
    sources = source_files(pattern, Path())
    if target.resolve() in {path.resolve() for path in sources}:
        raise BadInput(f"{target} is read and cannot be written: give the target another name")
    if target.is_dir():
        raise BadInput(f"{target} is a folder: give the target as a file, for example {target / 'rows.jsonl'}")
    schema, seen_at = _schema_of_all(_values(sources), name, columns)
    found = ((place, partial(_row, value, schema, seen_at, name, columns)) for place, value in _values(sources))
    with replaced(target) as file, _packed(file, target) as out:
        count = sum(out.write(jsonl.dump(row).encode()) > 0 for row in _usable(found, skipped if skip else None))
        if not count:
            raise BadInput(f"{pattern}: no usable rows{f'; the first: {skipped[0]}' if skipped else ''}")
    return Imported(schema, count, skipped)


def _usable(found: Iterable[tuple[str, Callable[[], Row]]], skipped: list[str] | None) -> Iterator[Row]:
    """Rows, without those that cannot be used: these are noted, or end it all if there is no list for them."""
    for place, row in found:
        try:
            yield row()
        except json_text.Malformed as problem:
            if skipped is None:
                raise BadInput(f"{place}: {problem}") from problem
            skipped.append(f"{place}: {problem}")


def _packed(file: IO[bytes], target: Path) -> AbstractContextManager[Any]:
    """What rows are written to; the same rows are the same file, so it holds no time and no name."""
    if target.suffix != ".gz":
        return nullcontext(file)
    return gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0)


def _values(sources: Iterable[Path]) -> Iterator[tuple[str, object]]:
    """(place, value or what is wrong with it) of every row."""
    for place, raw in (item for path in sources for item in jsonl.items(path)):
        try:
            yield place, json_text.value(raw)
        except json_text.Malformed as problem:
            yield place, problem


def _row(raw: object, schema: str, seen_at: str, name: str, columns: Mapping[str, str]) -> Row:
    """A row in the schema of all. Raises Malformed, which says why if it would do in a file of its own."""
    try:
        return seed_row(json_text.value(raw), schema, name, columns)
    except json_text.Malformed as problem:
        own = _schema(raw, name, columns)
        if own in (None, schema):
            raise
        raise json_text.Malformed(
            f"{problem}; this is a {own} row, and {seen_at} a {schema} row: split them"
        ) from problem


def _schema_of_all(found: Iterable[tuple[str, object]], name: str, columns: Mapping[str, str]) -> tuple[str, str]:
    """(the schema that loses nothing of any row, the place of the first that has it)."""
    first: dict[str | None, str] = {}
    for place, raw in found:
        first.setdefault(_schema(raw, name, columns), place)
    return next(((schema, first[schema]) for schema in RICHEST if schema in first), ("sft", ""))


def _schema(raw: object, name: str, columns: Mapping[str, str]) -> str | None:
    """What a row of the format is good for: two answers to compare, one to learn, or none. None if it is malformed."""
    try:
        row = FORMATS[name](renamed(raw, columns))
    except json_text.Malformed:
        return None
    if row.get("chosen") is not None:
        return "preference"
    return "sft" if row.get("response") is not None or _ends_answered(row.get("messages")) else "prompt"


def _ends_answered(turns: object) -> bool:
    """Whether the assistant speaks after the last turn that asks: a prompt keeps what was said before."""
    roles = [turn.get("role") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return "assistant" in takewhile(lambda role: role not in ASKING, reversed(roles))
