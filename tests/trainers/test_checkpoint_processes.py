"""Checkpoints and exports of several processes: handed on to others, cut off by kills, failing in one of them."""

from pathlib import Path

import checkpoint_processes
import pytest
from distributed.cells import SINGLE, Way
from distributed.processes import succeed


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["reshard", "kills", "reasons", "damage", "best", "export"])
def test_several_processes(scenario: str, tmp_path: Path):
    """What each scenario checks is said, and asserted, there. It forks its processes itself."""
    succeed(Way(SINGLE, processes=1), getattr(checkpoint_processes, scenario), tmp_path, log=tmp_path / "log")
