"""Rows of a data source by number, so that a step reads those it sees and no others."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from trainers import data_files, json_text, jsonl
from trainers.contract import BadInput
from trainers.core.hub import from_hub
from trainers.core.kept_folders import hold
from trainers.core.lines import indexed
from trainers.core.streams import Streamed, shown, stream_folder, streamed
from trainers.fingerprints import files_fingerprint, source_files
from trainers.formats.schemas import Row
from trainers.spec import DataSource, HubDataset

Raw = bytes | Row | json_text.Malformed
"""For :func:`trainers.json_text.value`: a line of JSON, a decoded row, or what is wrong in its place."""


class RowSource(Protocol):
    """(place for error messages, what stands there) by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> tuple[str, Raw]: ...


def raw_rows(source: DataSource, base_dir: Path) -> Iterator[tuple[str, Raw]]:
    """All rows of a source, one after the other: (place for error messages, what stands there)."""
    if source.files is not None:
        for path in source_files(source.files, base_dir):
            yield from jsonl.items(path)
    elif source.synthetic is not None:
        yield from _made(source)
    elif source.hub is not None and source.is_stream:
        yield from streamed(source.hub)
    elif source.hub is not None:
        dataset = _Table(source.hub)
        yield from (dataset[i] for i in range(len(dataset)))


def open_source(source: DataSource, base_dir: Path, folder: Path) -> RowSource:
    """The source's rows by number. ``folder`` keeps what is worth finding out only once about its files."""
    if source.files is not None:
        paths = source_files(source.files, base_dir)
        return Joined([indexed(path, _index_of(path, folder)) for path in paths])
    if source.hub is not None:
        return Streamed(source.hub, source.limit or 0, folder) if source.is_stream else _Table(source.hub)
    return list(_made(source))


def hold_source(source: DataSource, base_dir: Path, folder: Path) -> None:
    """What ``folder`` keeps of this source is used now, if it is there or not (:mod:`trainers.core.kept_folders`)."""
    if source.files is not None:
        for path in source_files(source.files, base_dir):
            hold(_index_of(path, folder))
    elif source.hub is not None and source.is_stream:
        hold(stream_folder(source.hub, folder))


def _index_of(path: Path, folder: Path) -> Path:
    kind = f"{'items' if data_files.is_list(path) else 'lines'}{'-packed' if path.suffix == '.gz' else ''}"
    return folder / f"{kind}-{files_fingerprint([path])[:32]}"


def _made(source: DataSource) -> Iterator[tuple[str, Row]]:
    from trainers.synthetic import generate

    made = source.synthetic
    assert made is not None
    name = f"synthetic {made.task}/{made.split}"
    try:
        for i, row in enumerate(generate(made.task, made.split, made.count, made.seed), 1):
            yield f"{name} row {i}", row
    except ValueError as error:
        raise BadInput(str(error)) from error


class Joined:
    """Several sources, one behind the other."""

    def __init__(self, parts: Sequence[RowSource]) -> None:
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> tuple[str, Raw]:
        part = bisect_right(self._ends, row)
        return self._parts[part][row - (self._ends[part - 1] if part else 0)]

    def damage(self, within: int) -> str:
        """Which file cannot be read to its end, and why, if that is among the first so many rows: behind its last one."""
        lasts = [
            part[len(part) - 1] for end, part in zip(self._ends, self._parts, strict=True) if part and end <= within
        ]
        return next((f"{place}: {raw}" for place, raw in lasts if isinstance(raw, json_text.Damaged)), "")


class _Table:
    """A dataset of the hub, or of a folder: Arrow files that `datasets` maps into memory."""

    def __init__(self, hub: HubDataset) -> None:
        from datasets import load_dataset

        self._name = shown(hub)
        self._table: Any = from_hub(
            f"dataset {hub.name} split {hub.split}",
            lambda: load_dataset(hub.name, hub.subset, split=hub.split, revision=hub.revision),
        )

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> tuple[str, Row]:
        return f"{self._name} row {row + 1}", dict(self._table[row])
