"""What is logged at which level."""

import subprocess
import sys

import pytest

LEVELS = ("debug", "info", "warning", "error")
SAY = """
import logging, sys
from controller.operator.logs import configure
configure("text", sys.argv[1])
for level in ("debug", "info", "warning", "error"):
    getattr(logging.getLogger("ours"), level)("a %s line", level)
"""


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_is_that_level_and_what_is_worse(level: str) -> None:
    """kopf's own words are others: with its `verbose` for info, debug lines were printed."""
    done = subprocess.run([sys.executable, "-c", SAY, level], capture_output=True, text=True, check=True)
    assert [one for one in LEVELS if f"a {one} line" in done.stderr] == list(LEVELS[LEVELS.index(level) :])


def test_a_level_that_is_none_is_refused() -> None:
    done = subprocess.run([sys.executable, "-c", SAY, "loud"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (1, "--log-level loud: one of debug, info, warning, error")
