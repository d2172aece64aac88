"""Every family split over two processes: the gradients of whole models, and generation that waits for nobody."""

import json
import subprocess
import sys
from pathlib import Path

from families.architectures import FAMILIES

SCRIPT = Path(__file__).parents[1] / "distributed" / "split_families.py"


def test_every_family_has_the_same_gradients_split_and_whole(family_dirs):
    models = [f"{family_dirs(name)[0]}={'bfloat16' if i % 2 else 'float32'}" for i, name in enumerate(FAMILIES)]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(SCRIPT),
        *models,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    log = done.stdout
    assert done.returncode == 0, log[-2000:] + done.stderr[-4000:]
    found = [json.loads(line.partition("FAMILY ")[2]) for line in log.splitlines() if "FAMILY {" in line]
    assert [entry["model"] for entry in found] == models
    for entry in found:
        assert entry.get("error", 1) <= 1e-6, entry  # both processes have the same sequences, so a mean is exact
        assert entry["generates"] == "True", entry
