"""DeepSpeed's ZeRO: what only several processes show."""

from collections.abc import Sequence

import pytest
from distributed.cells import ZERO, Way
from distributed.processes import succeed


@pytest.mark.slow
@pytest.mark.parametrize("cases", [("1", "2", "3s", "3l")], ids=["stages-and-adapters"])
def test_two_processes_train_as_one_does(cases, tmp_path):
    succeed(Way(ZERO), _train, cases, log=tmp_path / "log")


def _train(cases: Sequence[str]) -> None:
    import zero_processes  # where DeepSpeed may be

    zero_processes.main(list(cases))
