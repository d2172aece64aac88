"""From data sources to checked rows, with the record of what was read."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from trainers import json_text
from trainers.contract import BadInput, DataRecord
from trainers.core.sources import raw_rows
from trainers.fingerprints import fingerprint
from trainers.formats import schemas, seed_row
from trainers.spec import DataSource, RowPolicy

Row = schemas.Row


class Item(Protocol):
    """What a row becomes: a sequence, a pair, a prompt."""

    @property
    def shortened(self) -> int:
        """Tokens that the prompt has lost."""
        ...


T = TypeVar("T", bound=Item)


@dataclass
class Rows:
    """Rows of several sources, with the record of where they came from."""

    rows: list[Row] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    """Where each row stands, for messages."""
    records: list[DataRecord] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)


def read_rows(sources: Iterable[DataSource], schema: str, base_dir: Path, policy: RowPolicy, where: str) -> Rows:
    """Read and check all rows. Raises BadInput with file and line, or when too few are left (:class:`RowPolicy`)."""
    result = Rows()
    for i, source in enumerate(sources):
        before = len(result)
        skipped = _read_source(result, source, schema, base_dir, policy.on_malformed == "skip")
        record = DataRecord(
            source=f"{where}[{i}]",
            fingerprint=fingerprint(source, base_dir),
            rows=len(result) - before,
            skipped=len(skipped),
            first_skipped=skipped[0] if skipped else "",
        )
        result.records.append(record)
    check_share(result.records, policy, where)
    return result


def check_share(records: list[DataRecord], policy: RowPolicy, where: str) -> None:
    """Raise BadInput if too few of the rows of all sources are used."""
    used, found = sum(record.rows for record in records), sum(record.read for record in records)
    if used and used >= policy.min_rows * found:
        return
    losses = "; ".join(str(record) for record in records if record.rows < record.read)
    if not used:
        raise BadInput(f"{where}: no usable rows{f': {losses}' if losses else ''}")
    raise BadInput(
        f"{where}: only {used} of {found} rows can be used, less than minRows {policy.min_rows:g}: {losses}; "
        "mend the data, raise the length limit, or lower minRows"
    )


def _read_source(found: Rows, source: DataSource, schema: str, base_dir: Path, skip: bool) -> list[str]:
    """Add the source's rows to those found; what is wrong with each that was skipped."""
    last = None if source.limit is None else len(found) + source.limit
    skipped: list[str] = []
    for place, raw in raw_rows(source, base_dir):
        if len(found) == last:
            break
        try:
            value = json_text.value(raw)
            found.rows.append(seed_row(value, schema, source.format, source.columns))
            found.places.append(place)
        except json_text.Malformed as problem:
            if not skip:
                raise BadInput(f"{place}: {problem}") from problem
            # Behind a damage there is more that is lost: it is told before any single row.
            at = 0 if isinstance(problem, json_text.Damaged) else len(skipped)
            skipped.insert(at, f"{place}: {problem}")
    return skipped


def encode_rows(rows: Rows, encode: Callable[[Row], list[T]], policy: RowPolicy, where: str) -> list[T]:
    """:func:`encode_sources`, all in one list."""
    return [item for items in encode_sources(rows, encode, policy, where) for item in items]


def encode_sources(rows: Rows, encode: Callable[[Row], list[T]], policy: RowPolicy, where: str) -> list[list[T]]:
    """What every row of each source becomes, in order, counted in the source's record.

    A row that becomes nothing is dropped; one that ``encode`` refuses (a chat template may) is as good as malformed.
    Raises BadInput with a refused row's place, or when too few are left (:class:`RowPolicy`).
    """
    found: list[list[T]] = []
    first = 0
    for i, record in enumerate(rows.records):
        mine = range(first, first + record.rows)
        first += record.rows
        encoded, refused = _encode(rows, mine, encode, policy.on_malformed == "skip")
        kept = [items for items in encoded if items]
        found.append([item for items in kept for item in items])
        counts = {
            "rows": len(kept),
            "dropped": len(encoded) - len(kept),
            "shortened": sum(any(item.shortened for item in items) for items in kept),
            "skipped": record.skipped + len(refused),
            "first_skipped": record.first_skipped or (refused[0] if refused else ""),
        }
        rows.records[i] = record.model_copy(update=counts)
    check_share(rows.records, policy, where)
    return found


def _encode(
    rows: Rows, indices: Iterable[int], encode: Callable[[Row], list[T]], skip: bool
) -> tuple[list[list[T]], list[str]]:
    """(what each row becomes, what is wrong with each that was refused)."""
    encoded: list[list[T]] = []
    refused: list[str] = []
    for i in indices:
        try:
            encoded.append(encode(rows.rows[i]))
        except BadInput as problem:
            if not skip:
                raise BadInput(f"{rows.places[i]}: {problem}") from problem
            refused.append(f"{rows.places[i]}: {problem}")
    return encoded, refused
