"""Whatever is written to be found again: killed at any of its operations and begun again, it is as if nothing had happened."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kill_points import killed, operations

from trainers import fingerprints, json_text
from trainers.contract import Identity, Result
from trainers.core import kept_folders, streams
from trainers.core.lines import indexed
from trainers.core.row_store import Fate, Record, RowStore
from trainers.core.streams import Streamed
from trainers.files import new_directory, write_atomic
from trainers.formats.importer import import_rows
from trainers.phase_dir import PhaseDir, adopt, find_finished, history_dir, open_directory
from trainers.spec import HubDataset

ROWS = [{"prompt": f"p{i}", "response": "a \u2028" * (i + 1)} for i in range(40)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS)

RENAMED = {"instruction": "prompt", "output": "response"}

Work = Callable[[Path], Any]
"""Something that is done in a folder, and what is there in the end."""


def lines(name: str, content: bytes) -> Work:
    def work(folder: Path) -> list[Any]:
        if not (folder / name).exists():
            write_atomic(folder / name, content)
        found = indexed(folder / name, folder / "kept" / "index")
        return [json_text.value(found[i][1]) for i in range(len(found))]

    return work


def dropped(folder: Path) -> list[Any]:
    """What is kept of a file goes, as nobody has used it for long, and is made again."""
    work = lines("rows.jsonl.gz", gzip.compress(TEXT.encode()))
    work(folder)
    kept_folders._held.clear()  # as if that process had ended
    for mark in (folder / "kept").glob("*.used"):
        os.utime(mark, (1, 1))
    kept_folders.drop_unused(folder / "kept")
    assert not any(path.is_dir() for path in (folder / "kept").iterdir())
    return work(folder)


def digest(folder: Path) -> str:
    if not (folder / "rows").exists():
        write_atomic(folder / "rows", TEXT)
    os.utime(folder / "rows", (1e9, 1e9))
    fingerprints._known_to_all.cache_clear()
    return fingerprints.files_fingerprint([folder / "rows"])


def encoded(folder: Path) -> list[list[bytes]]:
    store = RowStore(folder, len(ROWS))
    for first in range(0, len(ROWS), 8):
        rows = np.arange(first, first + 8)
        missing = rows[store.fates(rows) == 0].tolist()
        store.write(missing, [Record(Fate.USED, [f"row {row}".encode()]) for row in missing])
    records = [store.read(row) for row in range(len(ROWS))]
    return [record.parts if record else [] for record in records]


def streamed(folder: Path) -> list[Any]:
    if not (folder / "hub" / "rows.jsonl").exists():
        write_atomic(folder / "hub" / "rows.jsonl", TEXT)
    rows = Streamed(HubDataset(name=str(folder / "hub"), streaming=True, shuffle_buffer=10), len(ROWS), folder / "kept")
    return [rows[i][1] for i in range(len(ROWS))]


def imported(folder: Path) -> str:
    if not (folder / "rows.jsonl").exists():
        write_atomic(folder / "rows.jsonl", TEXT)
    import_rows("alpaca", str(folder / "rows.jsonl"), folder / "rows.jsonl.gz", RENAMED, skip=False)
    return gzip.decompress((folder / "rows.jsonl.gz").read_bytes()).decode()


def displaced(folder: Path) -> list[str]:
    """A folder that takes another's place."""
    for content in ("old", "new"):
        with new_directory(folder / "made") as made:
            write_atomic(made / "a", content)
            write_atomic(made / "b" / "c", content)
    return sorted(f"{path.relative_to(folder)} {path.read_text()}" for path in folder.rglob("*") if path.is_file())


def finished(root: Path, digest: str) -> None:
    """A phase that has ended, unless it has already."""
    if not (root / "result.json").exists():
        write_atomic(root / "model" / "w", digest)
        write_atomic(root / "identity.json", json.dumps(Identity(digest=digest).document()))
        result = Result(
            run="r", phase="p", type="sft", digest=digest, artifact_digest="a", artifacts={}, metrics={}, seed=0, steps=1,
            started_at="", finished_at="", seconds=1.0,
        )  # fmt: skip
        write_atomic(root / "result.json", json.dumps(result.document()))


def adopted(folder: Path) -> tuple[str, list[str]]:
    """Another run's result in the place of an older one; every result that is found is whole, whenever."""
    for root in find_finished(folder, "new"):
        assert (root / "model" / "w").read_text() == "new", root
    finished(folder / "other" / "sft", "new")
    root = folder / "run" / "sft"
    if not (folder / "set-up").exists():
        finished(root, "old")
        write_atomic(folder / "set-up", "")
    if not PhaseDir(root).result.exists() or (root / "model" / "w").read_text() != "new":
        adopt(folder / "other" / "sft", root)
    return (root / "model" / "w").read_text(), [path.name for path in root.parent.iterdir()]


def begun(folder: Path) -> tuple[str, str, list[str]]:
    """A phase on edited data in the place of another's unfinished work, which no edit deletes."""
    root = folder / "run" / "sft"
    if not history_dir(root, "old").exists() and not (root / "identity.json").exists():
        open_directory(PhaseDir(root), Identity(digest="old"))
    work = root if (root / "identity.json").exists() and "old" in (root / "identity.json").read_text() else None
    if work and not (root / "metrics.jsonl").exists():
        write_atomic(root / "metrics.jsonl", "done")
    open_directory(PhaseDir(root), Identity(digest="new"))
    old = (history_dir(root, "old") / "metrics.jsonl").read_text()
    return (root / "identity.json").read_text(), old, [path.name for path in root.rglob("*.tmp")]


WORKS: dict[str, Work] = {
    "places of lines": lines("rows.jsonl", TEXT.encode()),
    "places of packed lines": lines("rows.jsonl.gz", gzip.compress(TEXT.encode())),
    "places of items": lines("rows.json", json.dumps(ROWS).encode()),
    "what nobody uses": dropped,
    "a digest": digest,
    "encoded rows": encoded,
    "a stream": streamed,
    "imported rows": imported,
    "a folder in another's place": displaced,
    "an adopted result": adopted,
    "a phase that begins": begun,
}

SLOW = ("a stream",)
"""`datasets` takes its time: killed at every fifth operation."""


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(fingerprints, "BLOCK", 1000)
    monkeypatch.setattr(streams, "BLOCK", 16)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("what", WORKS)
def test_killed_at_any_operation_and_begun_again(what, tmp_path):
    work = WORKS[what]
    wanted = work(tmp_path / "whole")
    count = len(operations(work, tmp_path / "counted"))
    assert count > 3
    for at in range(0, count, 5 if what in SLOW else 1):
        folder = tmp_path / f"killed-{at}"
        killed(work, folder, at)
        assert work(folder) == wanted, operations(work, tmp_path / f"again-{at}")[at]
