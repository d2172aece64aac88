"""Rows that are not held are those that are."""

import json

import pytest

from trainers.contract import BadInput
from trainers.core import checked_rows
from trainers.core.checked_rows import CheckedRows
from trainers.core.rows import read_rows
from trainers.spec import DataSource, RowPolicy

SKIP = RowPolicy(on_malformed="skip", min_rows=0)


@pytest.fixture
def sources(tmp_path):
    lines = [json.dumps({"prompt": f"{i}"}) if i % 4 else '{"prompt": ' for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))
    (tmp_path / "b.json").write_text(json.dumps([{"question": f"{i} é"} for i in range(20)], indent=1))
    return (
        DataSource(files="a.jsonl", limit=17),
        DataSource(files="b.json", columns={"prompt": "question"}),
        DataSource(synthetic={"task": "letters", "split": "prompts", "count": 12}),
    )


@pytest.mark.parametrize("held", [0, 16, 100])
def test_they_are_those_of_a_reader_that_holds_all(tmp_path, sources, monkeypatch, held):
    monkeypatch.setattr(checked_rows, "HELD_ROWS", held)
    found = CheckedRows(sources, "prompt", tmp_path, SKIP, "data.rows", tmp_path / "index")
    wanted = read_rows(sources, "prompt", tmp_path, SKIP, "data.rows")
    assert list(found) == found[:] == wanted.rows
    assert found[15:19] == wanted.rows[15:19] and found[-1] == wanted.rows[-1]
    assert [found.place(i) for i in range(len(found))] == wanted.places
    assert found.records == wanted.records
    assert (tmp_path / "index").exists() == (held < 20)


def test_the_first_that_cannot_be_used_is_told(tmp_path, sources):
    with pytest.raises(BadInput, match=r"a\.jsonl:1: not valid JSON"):
        CheckedRows(sources, "prompt", tmp_path, RowPolicy(), "data.rows", tmp_path / "index")
    with pytest.raises(BadInput, match=r"data\.rows: only 17 of 23 rows can be used, less than minRows 0.9"):
        policy = RowPolicy(on_malformed="skip", min_rows=0.9)
        CheckedRows(sources[:1], "prompt", tmp_path, policy, "data.rows", tmp_path / "index")
