"""Rows that are used one after the other, more than once: all are checked first, and few are held."""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import overload

from trainers import json_text
from trainers.contract import BadInput, DataRecord
from trainers.core.rows import check_share
from trainers.core.sources import Raw, RowSource, open_source, raw_rows
from trainers.fingerprints import fingerprint
from trainers.formats import seed_row
from trainers.formats.schemas import Row
from trainers.spec import DataSource, RowPolicy

HELD_ROWS = 4096
"""Rows of a source that are held in memory if they are all. Of more, eight bytes each are: where it stands."""


class CheckedRows(Sequence[Row]):
    """The rows of some sources that can be used, by number."""

    def __init__(
        self, sources: Iterable[DataSource], schema: str, base_dir: Path, policy: RowPolicy, where: str, folder: Path
    ) -> None:
        """``folder`` keeps where rows stand. Raises BadInput with file and line, or if too few are left (RowPolicy)."""
        self._parts = [_Part(source, schema, base_dir, folder) for source in sources]
        self.records = [part.check(policy, f"{where}[{i}]") for i, part in enumerate(self._parts)]
        check_share(self.records, policy, where)
        self._ends = list(accumulate(record.rows for record in self.records))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self._at(i)[1] for i in range(len(self))[index]]
        return self._at(range(len(self))[index])[1]

    def place(self, index: int) -> str:
        """Where a row stands, for messages."""
        return self._at(index)[0]

    def _at(self, index: int) -> tuple[str, Row]:
        part = bisect_right(self._ends, index)
        return self._parts[part].at(index - (self._ends[part - 1] if part else 0))


class _Part:
    """The rows of one source."""

    def __init__(self, source: DataSource, schema: str, base_dir: Path, folder: Path) -> None:
        self._source, self._schema, self._base_dir, self._folder = source, schema, base_dir, folder
        self._held: list[tuple[str, Row]] | None = []
        self._numbers = array("q")

    def check(self, policy: RowPolicy, name: str) -> DataRecord:
        """Look at every row once. Raises BadInput at one that cannot be used, unless it may be skipped."""
        skipped = _Skipped()
        for number, (place, raw) in enumerate(raw_rows(self._source, self._base_dir)):
            if len(self._numbers) == self._source.limit:
                break
            try:
                self._keep(number, place, self._checked(raw))
            except json_text.Malformed as problem:
                if policy.on_malformed == "stop":
                    raise BadInput(f"{place}: {problem}") from problem
                skipped.add(place, problem)
        return DataRecord(
            source=name,
            fingerprint=fingerprint(self._source, self._base_dir),
            rows=len(self._numbers),
            skipped=skipped.count,
            first_skipped=skipped.first,
        )

    def at(self, index: int) -> tuple[str, Row]:
        if self._held is not None:
            return self._held[index]
        place, raw = self._rows[self._numbers[index]]
        return place, self._checked(raw)

    @cached_property
    def _rows(self) -> RowSource:
        last = self._numbers[-1]  # a stream has as many rows as are asked for
        return open_source(self._source.model_copy(update={"limit": last + 1}), self._base_dir, self._folder)

    def _keep(self, number: int, place: str, row: Row) -> None:
        self._numbers.append(number)
        if self._held is not None:
            self._held.append((place, row))
            if len(self._held) > HELD_ROWS:
                self._held = None

    def _checked(self, raw: Raw) -> Row:
        return seed_row(json_text.value(raw), self._schema, self._source.format, self._source.columns)


class _Skipped:
    def __init__(self) -> None:
        self.count, self.first = 0, ""

    def add(self, place: str, problem: json_text.Malformed) -> None:
        self.count += 1
        # Behind a damage there is more that is lost: it is told before any single row.
        if not self.first or isinstance(problem, json_text.Damaged):
            self.first = f"{place}: {problem}"
