"""A phase under a user that the machine does not know, of group 0, as OpenShift runs every pod."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.requirements import not_here

from trainers.contract import TERMINATION_VARIABLE

ROOT = Path(__file__).parents[2]
USER = 1000670000
ROWS = {"synthetic": {"task": "letters", "split": "demonstrations", "count": 32}}
SPEC = {
    "model": {
        "scratch": {
            "hiddenSize": 16,
            "numLayers": 1,
            "tokenizer": {
                "kind": "word",
                "vocabSize": 64,
                "trainOn": [{"synthetic": {"task": "letters", "split": "demonstrations", "count": 32}}],
            },
        }
    },
    "data": {"train": [ROWS], "packing": False},
    "duration": {"maxSteps": 2},
    "batchSize": 2,
}


CACHES = """
import getpass
import torch._inductor.runtime.cache_dir_utils as inductor
import triton.knobs
print(getpass.getuser(), inductor.cache_dir(), triton.knobs.cache.dir)
"""


@pytest.fixture
def pod() -> Iterator[Path]:
    """What such a pod may write to: /tmp and the workspace, both of group 0. pytest's own folders are for root alone."""
    with tempfile.TemporaryDirectory(prefix="any-user-") as folder:
        root = Path(folder)
        root.chmod(0o755)
        for name in ("tmp", "workspace"):
            (root / name).mkdir()
            (root / name).chmod(0o2770)
        yield root


def as_nobody(pod: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """With the variables of a pod (controller/backends/cluster/pod.py), and none of this session's."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(pod / "tmp"),
        "TMPDIR": str(pod / "tmp"),
        "USER": "trainer",
        "HF_HOME": str(pod / "workspace/.cache/huggingface"),
        "OMP_NUM_THREADS": "1",
        TERMINATION_VARIABLE: str(pod / "tmp/last-word"),
    }
    known = ["setpriv", f"--reuid={USER}", "--regid=0", "--clear-groups", "--no-new-privs", sys.executable, *command]
    return subprocess.run(known, env=environment, cwd=pod, capture_output=True, text=True, check=False, timeout=900)


def readable_by_others(pod: Path) -> None:
    if os.getuid() != 0 or not shutil.which("setpriv"):
        not_here("to be another user takes root and setpriv")
    if as_nobody(pod, "-c", "import trainers").returncode:
        not_here(f"{sys.executable} or {ROOT} cannot be read by others")


def test_a_phase_runs_as_a_user_without_an_entry(pod: Path):
    readable_by_others(pod)
    phase = {"output": str(pod / "workspace/run/sft"), "run": "run", "phase": "sft", "spec": SPEC}
    (pod / "phase.json").write_text(json.dumps(phase))
    done = as_nobody(pod, "-m", "trainers", "sft", "--spec", str(pod / "phase.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    result = pod / "workspace/run/sft/result.json"
    assert result.stat().st_uid == USER
    assert json.loads((pod / "tmp/last-word").read_text())["digest"]


@pytest.mark.compiled
def test_caches_of_compilers_are_in_the_pods_own_folder(pod: Path):
    readable_by_others(pod)
    compiled = as_nobody(pod, "-c", CACHES)
    user, *folders = compiled.stdout.split()
    assert (user, compiled.returncode) == ("trainer", 0), compiled.stderr
    assert all(folder.startswith(str(pod / "tmp")) for folder in folders), folders
