"""What the end of a local process means."""

import json
from pathlib import Path

import pytest

from controller.backends.local import process
from trainers.contract import FailureClass

OOM, INFRA = FailureClass.OUT_OF_MEMORY, FailureClass.INFRASTRUCTURE


@pytest.mark.parametrize(
    ("status", "word", "starved", "failure"),
    [
        (-9, None, False, INFRA),
        (-9, None, True, OOM),
        (1, None, True, OOM),  # torchrun, of which a worker was killed
        (1, None, False, FailureClass.INTERNAL),
        (143, None, False, FailureClass.INTERRUPTED),  # its launcher, before any process could speak
        (75, "Infrastructure", True, OOM),  # a peer of the one that was killed: its connection broke
        (75, "Infrastructure", False, INFRA),
        (2, "BadInput", True, FailureClass.BAD_INPUT),
        (0, None, True, None),
    ],
)
def test_a_process_that_the_kernel_ended_for_memory_has_run_out_of_it(
    tmp_path: Path, status: int, word: str | None, starved: bool, failure: FailureClass | None
) -> None:
    if word is not None:
        file = process.termination_file(tmp_path, 1)
        file.parent.mkdir()
        file.write_text(json.dumps({"failure": word, "message": "said"}))
    assert process.classify(status, tmp_path, 1, starved)[0] == failure


def test_the_kernels_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "VMSTAT", tmp_path / "vmstat")
    assert process.oom_kills() == 0
    (tmp_path / "vmstat").write_text("nr_free_pages 1\noom_kill 7\n")
    assert process.oom_kills() == 7
