"""`alignctl run` in a workspace that another machine has too, where a file lock may not reach."""

from pathlib import Path

import pytest

from controller.backends.local.backend import _make_room, _take_over
from trainers.contract import Identity
from trainers.lease import FolderLease, Held, this_process
from trainers.phase_dir import PhaseDir, history_dir, open_directory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A phase's folder with unfinished work."""
    root = tmp_path / "runs/test/base"
    open_directory(PhaseDir(root), Identity(digest="old"))
    return root


def test_what_another_machine_writes_is_not_put_aside(root: Path, tmp_path: Path) -> None:
    there = this_process("test").model_copy(update={"machine": "another"})
    with FolderLease(root, there):
        with pytest.raises(Held):
            _make_room(root, Identity(digest="new"), "test")
        assert not _take_over(tmp_path / "runs/other/base", root, "test"), "the phase is started, and waits for it"
        assert PhaseDir(root).read_identity() == Identity(digest="old")
    _make_room(root, Identity(digest="new"), "test")
    assert history_dir(root, "old").exists()


def test_what_a_killed_process_of_this_machine_left_is(root: Path) -> None:
    dead = FolderLease(root, this_process("test").model_copy(update={"pid": 2**22 - 1}))
    dead.acquire()
    dead._left.set()
    _make_room(root, Identity(digest="new"), "test")
    assert history_dir(root, "old").exists()
