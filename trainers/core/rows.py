"""From data sources to checked rows, with the record of what was read."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from trainers import jsonl
from trainers.contract import BadInput, DataRecord
from trainers.core.hub import from_hub
from trainers.fingerprints import fingerprint, source_files
from trainers.spec import DataSource

Row = dict[str, Any]
T = TypeVar("T")

SCHEMAS: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    "sft": {"prompt": str, "response": str},
    "preference": {"prompt": str, "chosen": str, "rejected": str},
    "preference with margin": {"prompt": str, "chosen": str, "rejected": str, "margin": (int, float)},
    "prompt": {"prompt": str},
    "traces": {"prompt": str, "teacher_response": str, "reward": (int, float)},
}
"""Keys that a row must have, by schema. `sft` and `prompt` rows may hold chat `messages` instead."""


@dataclass
class Rows:
    """Rows of several sources, with the record of where they came from."""

    rows: list[Row] = field(default_factory=list)
    records: list[DataRecord] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)


def read_rows(sources: Iterable[DataSource], schema: str, base_dir: Path, on_malformed: str, where: str) -> Rows:
    """Read and check all rows. Raises BadInput with file and line, or with the reason why nothing is left."""
    result = Rows()
    for i, source in enumerate(sources):
        rows, skipped = _read_source(source, SCHEMAS[schema], schema, base_dir, on_malformed == "skip")
        result.rows += rows
        mark = fingerprint(source, base_dir)
        result.records.append(DataRecord(source=f"{where}[{i}]", fingerprint=mark, rows=len(rows), skipped=skipped))
    if not result.rows:
        raise BadInput(f"{where}: no usable rows")
    return result


def _read_source(
    source: DataSource, keys: Mapping[str, Any], schema: str, base_dir: Path, skip: bool
) -> tuple[list[Row], int]:
    rows: list[Row] = []
    skipped = 0
    for place, raw in raw_rows(source, base_dir):
        if source.limit is not None and len(rows) == source.limit:
            break
        problem, row = _check_row(raw, keys, schema, source.columns)
        if problem is None:
            rows.append(row)
        elif skip:
            skipped += 1
        else:
            raise BadInput(f"{place}: {problem}")
    return rows, skipped


def raw_rows(source: DataSource, base_dir: Path) -> Iterator[tuple[str, bytes | Row]]:
    """(place for error messages, line of JSON or decoded row)."""
    if source.files is not None:
        for path in source_files(source.files, base_dir):
            yield from jsonl.lines(path)
    elif source.synthetic is not None:
        from trainers.synthetic import generate

        made = source.synthetic
        name = f"synthetic {made.task}/{made.split}"
        try:
            for i, row in enumerate(generate(made.task, made.split, made.count, made.seed), 1):
                yield f"{name} row {i}", row
        except ValueError as error:
            raise BadInput(str(error)) from error
    elif source.hub is not None:
        yield from _hub_rows(source)


def _hub_rows(source: DataSource) -> Iterator[tuple[str, Row]]:
    from datasets import load_dataset

    hub = source.hub
    assert hub is not None
    dataset = from_hub(
        f"dataset {hub.name} split {hub.split}",
        lambda: load_dataset(hub.name, hub.subset, split=hub.split, revision=hub.revision),
    )
    for i, row in enumerate(dataset, 1):
        yield f"{hub.name}[{hub.split}] row {i}", dict(row)


def _check_row(
    raw: bytes | Row, keys: Mapping[str, Any], schema: str, columns: Mapping[str, str]
) -> tuple[str | None, Row]:
    """(what is wrong or None, the row)."""
    try:
        row = jsonl.parse(raw) if isinstance(raw, bytes) else raw
    except jsonl.Malformed as error:
        return str(error), {}
    if not isinstance(row, dict):
        return f"expected an object, got {type(row).__name__}", {}
    row = {**row, **{key: row[column] for key, column in columns.items() if column in row}}
    if "messages" in row and schema in ("sft", "prompt"):
        problem = _check_messages(row["messages"], schema)
        return problem, _without_answer(row) if schema == "prompt" and problem is None else row
    for key, kind in keys.items():
        if key not in row:
            return f"key {key!r} is missing; {schema} rows need {', '.join(keys)}", {}
        if (problem := _check_value(row[key], kind)) is not None:
            return f"{key} is {problem}", {}
    return None, row


def _check_value(value: object, kind: type | tuple[type, ...]) -> str | None:
    if not isinstance(value, kind) or isinstance(value, bool):
        return f"{type(value).__name__}, expected {_kind_name(kind)}"
    if isinstance(value, float) and not math.isfinite(value):  # JSON has no NaN, but Python reads and writes it
        return f"{value}, expected a finite number"
    return None


def _kind_name(kind: type | tuple[type, ...]) -> str:
    return "text" if kind is str else "a number"


def _check_messages(messages: object, schema: str) -> str | None:
    if not isinstance(messages, list) or not messages:
        return "messages must be a non-empty list"
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return f"messages[{i}] needs a text content"
        if message.get("role") not in ("system", "user", "assistant"):
            return f"messages[{i}].role is {message.get('role')!r}, expected system, user or assistant"
    if schema == "sft" and all(m["role"] != "assistant" for m in messages):
        return "messages hold no assistant turn to learn from"
    if schema == "prompt" and all(m["role"] != "user" for m in messages):
        return "messages hold no user turn to respond to"
    return None


def _without_answer(row: Row) -> Row:
    """A conversation as a prompt: up to its last user turn. What followed is the answer that is asked for."""
    messages = list(row["messages"])
    while messages[-1]["role"] != "user":
        messages.pop()
    return {**row, "messages": messages}


def encode_rows(rows: Rows, encode: Callable[[Row], list[T]], where: str) -> list[T]:
    """What every row becomes, in order. A row that becomes nothing is dropped, and counted in its source's record."""
    items: list[T] = []
    first = 0
    for i, record in enumerate(rows.records):
        encoded = [encode(row) for row in rows.rows[first : first + record.rows]]
        first += record.rows
        kept = [found for found in encoded if found]
        rows.records[i] = record.model_copy(update={"rows": len(kept), "dropped": len(encoded) - len(kept)})
        items += [item for found in kept for item in found]
    if not items:
        raise BadInput(f"{where}: every row is too long for the length limit")
    return items
