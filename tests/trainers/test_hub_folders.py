"""Folders in the place of data sets of the hub: from the run's file on, whatever folder a phase is started in."""

import os
from pathlib import Path

import pytest

from trainers.contract import PhaseFile
from trainers.fingerprints import fingerprint
from trainers.phases.sft.spec import SftSpec
from trainers.pins import hub_names, pinned_spec
from trainers.spec import DataSource


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "runs/set").mkdir(parents=True)
    (tmp_path / "runs/set/rows.jsonl").write_text('{"prompt": "q", "response": "a"}\n')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "runs"


def spec(name: str) -> SftSpec:
    train = [{"hub": {"name": name, "streaming": True}, "limit": 1}]
    return SftSpec.model_validate({"model": {"source": "m"}, "data": {"train": train}})


def test_a_phase_gets_the_whole_path(base: Path):
    asked = spec("./set")
    assert [found.type for found in hub_names(asked, base)] == ["model"]
    file = PhaseFile(run="r", phase="p", output=str(base / "out"), base_dir=str(base), spec=asked.document())
    there = pinned_spec(asked, file, elsewhere=["m"])
    assert there.data.train[0].hub.name == str(base / "set")


@pytest.mark.parametrize("name", ["set", "./set", "WHOLE"])
def test_its_content_counts_and_not_how_it_is_named_or_where_it_lies(base: Path, tmp_path: Path, name: str):
    def mark(written: str, at: Path) -> str:
        return fingerprint(DataSource.model_validate({"hub": {"name": written}}), at)

    before = mark("set", base)
    assert mark(name.replace("WHOLE", str(base / "set")), base) == before
    os.rename(base, tmp_path / "moved")
    assert mark("set", tmp_path / "moved") == before
    (tmp_path / "moved/set/rows.jsonl").write_text('{"prompt": "q", "response": "b"}\n')
    assert mark("set", tmp_path / "moved") != before
