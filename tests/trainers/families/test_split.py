"""Every family split over two processes: the gradients of whole models, and generation that waits for nobody."""

import json
from pathlib import Path

from distributed.conftest import torchrun
from families.architectures import FAMILIES

SCRIPT = Path(__file__).parents[1] / "distributed" / "split_families.py"


def test_every_family_has_the_same_gradients_split_and_whole(family_dirs, tmp_path):
    models = [f"{family_dirs(name)[0]}={'bfloat16' if i % 2 else 'float32'}" for i, name in enumerate(FAMILIES)]
    codes = torchrun([str(SCRIPT), *models], 2, 1, tmp_path)
    log = (tmp_path / "node-0.log").read_text()
    assert codes == [0], log[-4000:]
    found = [json.loads(line.partition("FAMILY ")[2]) for line in log.splitlines() if "FAMILY {" in line]
    assert [entry["model"] for entry in found] == models
    for entry in found:
        assert entry.get("error", 1) <= 1e-6, entry  # both processes have the same sequences, so a mean is exact
        assert entry["generates"] == "True", entry
