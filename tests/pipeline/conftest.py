"""The quickstart's pipeline, shortened, once on this machine: other tests look at it, or compare a cluster with it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALIGNCTL = str(Path(sys.executable).parent / "alignctl")
QUICKSTART = ROOT / "configs/quickstart.yaml"
SHORT = Path(__file__).with_name("short.yaml")


def alignctl(command: str, workspace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [ALIGNCTL, command, str(QUICKSTART), "-f", str(SHORT), "--workspace", str(workspace), *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=900, env=os.environ, check=False)


@pytest.fixture(scope="session")
def quickstart() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``quickstart(command, workspace, *arguments)``: alignctl with the shortened quickstart."""
    return alignctl


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a workspace")
    done = alignctl("run", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "right answers" in done.stdout
    assert "report.html" in done.stdout
    return folder
