"""Lines by number are the lines that a reader of the whole file sees, whatever the file holds."""

import gzip
import os
import re
import shutil
import signal
from multiprocessing import get_context

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers import data_files, files, json_lists, json_text, jsonl
from trainers.contract import BadInput, Infrastructure
from trainers.core import lines
from trainers.core.lines import indexed

PIECES = [b"a", b" ", b"\n", b"\r", b"\xef\xbb\xbf", b'{"a": 1}', b"\n\n", b" x", b"\x00", "\u2028".encode()]


def said(found):
    return [
        (place, str(line) if isinstance(line, json_text.Malformed) else line.rstrip(b"\n")) for place, line in found
    ]


def by_number(path, folder):
    found = indexed(path, folder)
    return said(found[i] for i in range(len(found)))


@given(st.lists(st.sampled_from(PIECES), max_size=14), st.sampled_from([4, 64, 2**20]), st.booleans())
def test_any_bytes(tmp_path_factory, pieces, chunk, packed):
    folder = tmp_path_factory.mktemp("lines")
    path = folder / ("f.jsonl.gz" if packed else "f.jsonl")
    (gzip.open if packed else open)(path, "wb").write(b"".join(pieces))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CHUNK", chunk)
        patch.setattr(lines, "BLOCK", 2 * chunk)
        assert by_number(path, folder / "index") == said(jsonl.lines(path))
    shutil.rmtree(folder)


ITEMS = [
    b"{}",
    b'{"a": "\xc3\xa9\n"}',
    b'{"a": [1,\n 2]}',
    b'"\xff"',
    b"1.5e+3",
    b"NaN",
    b'{"a":1,"a":2}',
    "\u2028".encode(),
]
BETWEEN = [b",", b" ,\n", b"\n\n,  "]


def values(found):
    """What a reader makes of rows; of one that cannot be used only that it cannot."""
    for place, raw in found:
        try:
            yield place, json_text.value(raw)
        except json_text.Malformed as problem:
            yield place, type(problem)


@given(st.lists(st.sampled_from(ITEMS), max_size=8), st.sampled_from(BETWEEN), st.booleans(), st.integers(1, 60))
def test_items_of_a_list_are_those_that_its_reader_sees(tmp_path_factory, items, between, packed, chunk):
    folder = tmp_path_factory.mktemp("lists")
    path = folder / ("f.json.gz" if packed else "f.json")
    (gzip.open if packed else open)(path, "wb").write(data_files.BOM + b" [\n" + between.join(items) + b"]\n ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lists, "CHUNK", chunk)
        try:
            wanted = list(values(jsonl.items(path)))
        except BadInput as problem:
            with pytest.raises(BadInput, match=re.escape(str(problem))):
                indexed(path, folder / "index")
        else:
            found = indexed(path, folder / "index")
            assert list(values(found[i] for i in range(len(found)))) == wanted
    shutil.rmtree(folder)


def test_a_damaged_list_ends_where_its_reader_stops(tmp_path):
    whole = gzip.compress(b"[" + b",".join(b'{"row": %d}' % i for i in range(5000)) + b"]")
    path = tmp_path / "f.json.gz"
    for cut in (len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[:cut])
        found = indexed(path, tmp_path / f"index-{cut}")
        assert list(values(found[i] for i in range(len(found)))) == list(values(jsonl.items(path)))
        assert len(found) > 1000


def test_a_damaged_file_ends_where_its_reader_stops(tmp_path):
    whole = gzip.compress(b"".join(b'{"row": %d}\n' % i for i in range(5000)))
    path = tmp_path / "f.jsonl.gz"
    for cut in (3, len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[:cut])
        assert by_number(path, tmp_path / f"index-{cut}")[-1] == said(jsonl.lines(path))[-1]


def test_a_process_that_is_killed_while_it_looks_leaves_nothing_that_is_believed(tmp_path):
    path = tmp_path / "f.jsonl.gz"
    path.write_bytes(gzip.compress(b"{}\n" * 100))

    def die():
        files.commit_directory = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        indexed(path, tmp_path / "index")

    process = get_context("fork").Process(target=die)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [found.name for found in tmp_path.iterdir() if found.is_dir()] == [".index.tmp"]
    assert by_number(path, tmp_path / "index") == said(jsonl.lines(path))
    assert [found.name for found in tmp_path.iterdir() if found.is_dir()] == ["index"]


def test_a_line_of_no_end_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE", 10)
    monkeypatch.setattr(lines, "MAX_LINE", 10)
    (tmp_path / "f.jsonl").write_bytes(b'{"a":1}\n' + b"x" * 50 + b'\n{"b":2}\n')
    assert by_number(tmp_path / "f.jsonl", tmp_path / "index") == said(jsonl.lines(tmp_path / "f.jsonl"))


def test_a_file_that_is_edited_while_it_is_read_is_noticed(tmp_path):
    (tmp_path / "f.jsonl").write_text("{}\n{}\n")
    found = indexed(tmp_path / "f.jsonl", tmp_path / "index")
    (tmp_path / "f.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(Infrastructure, match=r"f\.jsonl was edited while it was read"):
        found[0]
