"""A look at the first rows of a run's data: whether the phases that read them can."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from controller.api.problems import Problem, shown
from trainers import json_text, jsonl
from trainers.contract import BadInput
from trainers.fingerprints import source_files
from trainers.formats import seed_row
from trainers.spec import DataSource, PhaseSpec, RowPolicy, TracesRef, find_models, is_address
from trainers.synthetic import generate

LOOKED_AT = 20
"""Rows of each source: what is wrong with a column is wrong from the first row on."""


def row_problems(place: str, spec: PhaseSpec, base_dir: Path) -> Iterator[Problem]:
    """The first unusable row of every source, as the phase would name it. Sources that are elsewhere are left to it."""
    schemas = spec.row_schemas()
    for path, policy in find_models(spec, RowPolicy):
        schema = schemas[path.split(".")[0].split("[")[0]]
        for at, source in find_models(policy, DataSource, path):
            yield from _problems(f"{place}.{at}", source, schema, base_dir, policy.on_malformed == "skip")
    for path, traces in find_models(spec, TracesRef):
        if traces.files is not None:
            yield from _problems(f"{place}.{path}", DataSource(files=traces.files), "traces", base_dir, skip=False)


def _problems(path: str, source: DataSource, schema: str, base_dir: Path, skip: bool) -> Iterator[Problem]:
    """With ``skip`` only if no row at all can be used. A source without rows is one: it was not meant to be empty."""
    try:
        looked_at = islice(_rows(source, base_dir), LOOKED_AT)
        faults = [_fault(place, raw, source, schema) for place, raw in looked_at]
    except BadInput as error:
        yield Problem(path, str(error))
        return
    if not faults and source.files is not None and not is_address(source.files):
        yield Problem(path, f"{shown(source.files)} holds no rows")
    found = [fault for fault in faults if fault]
    if found and (not skip or len(found) == len(faults)):
        yield Problem(path, found[0])


def _fault(place: str, raw: Any, source: DataSource, schema: str) -> str | None:
    try:
        row = json_text.value(raw)
        seed_row(row, schema, source.format, source.columns)
    except json_text.Malformed as problem:
        return f"{place}: {problem}"
    return None


def _rows(source: DataSource, base_dir: Path) -> Iterator[tuple[str, Any]]:
    if source.files is not None and not is_address(source.files):
        for file in source_files(source.files, base_dir):
            yield from jsonl.items(file)
    elif source.synthetic is not None:
        made = source.synthetic
        for row in generate(made.task, made.split, min(made.count, LOOKED_AT), made.seed):
            yield f"synthetic {made.task}/{made.split}", row
