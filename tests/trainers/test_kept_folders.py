"""What is kept for others stays while somebody uses it, and is whole or not there."""

import gzip
import os
import time
from collections import namedtuple

import pytest

from trainers.core import kept_folders
from trainers.core.kept_folders import drop_unused, hold
from trainers.core.lines import indexed
from trainers.core.row_store import Fate, Record, RowStore

OLD = (1, 1)


@pytest.fixture
def folder(tmp_path):
    """``folder(name, used=...)``: one that no process uses, and when one did."""

    def made(name, used=None):
        (tmp_path / name / "inside").mkdir(parents=True)
        hold(tmp_path / name)
        kept_folders._held.pop(tmp_path / name).close()
        os.utime(tmp_path / f"{name}.used", (used or time.time(),) * 2)
        return tmp_path / name

    return made


def test_old_ones_go_and_those_in_use_stay(folder, tmp_path):
    old, young, used = folder("old", 1), folder("young"), folder("used", 1)
    hold(used)
    drop_unused(tmp_path)
    assert [path.exists() for path in (old, young, used)] == [False, True, True]


def test_where_there_is_no_room_the_oldest_go_first_but_none_that_is_used_or_being_made(folder, tmp_path, monkeypatch):
    places = [folder(f"f{i}", time.time() - 100 * i) for i in range(3)]
    os.utime(hold(places[2]).with_name("f2.used"), (time.time() - 300,) * 2)
    (tmp_path / ".f2.tmp").mkdir()
    free = iter([5, 5, 5, 50])
    Usage = namedtuple("Usage", "total free")
    monkeypatch.setattr(kept_folders.shutil, "disk_usage", lambda root: Usage(100, next(free)))
    drop_unused(tmp_path)
    assert [path.exists() for path in places] == [True, False, True]
    assert (tmp_path / ".f2.tmp").exists()


@pytest.mark.parametrize("name", ["plain", "starts.i64", "blanks.i64", "damage"])
def test_places_of_which_some_were_removed_by_hand_are_found_again(tmp_path, name):
    content = gzip.compress(b"1\n\n2\n" * 500)
    (tmp_path / "f.jsonl.gz").write_bytes(content[:-30])
    before = indexed(tmp_path / "f.jsonl.gz", tmp_path / "index")
    (tmp_path / "index" / name).unlink()
    after = indexed(tmp_path / "f.jsonl.gz", tmp_path / "index")
    said = [
        [(place, str(row)) for place, row in map(found.__getitem__, range(len(found)))] for found in (before, after)
    ]
    assert said[0] == said[1]
    assert "damaged gzip file" in said[0][-1][1]


def test_a_segment_that_was_removed_by_hand_leaves_its_rows_to_be_made_again(tmp_path):
    store = RowStore(tmp_path, 4)
    for row in (0, 1):
        store.write([row], [Record(Fate.USED, [b"of row %d" % row])])
    (tmp_path / "segment-0000001").unlink()
    again = RowStore(tmp_path, 4)
    again.write([2], [Record(Fate.USED, [b"of row 2"])])  # gets the number that is free
    assert again.read(1) is None
    assert [again.read(row).parts for row in (0, 2)] == [[b"of row 0"], [b"of row 2"]]
