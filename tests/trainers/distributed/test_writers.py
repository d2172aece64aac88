"""A process that is killed while it writes, or while another does, costs time alone: what is written in the end is the same."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed.cells import data
from distributed.conftest import write

from trainers.files import tree_digest

DYING = Path(__file__).with_name("dying_writers.py")
ROWS = 4500
"""More than are held in memory."""

pytestmark = pytest.mark.distributed


def spec_of(kind: str, model: Path, folder: Path) -> dict[str, Any]:
    parallel = {"strategy": "ddp", "microBatchTokens": 128}
    if kind == "rollout":
        sampling = {"maxNewTokens": 6, "batchSize": 4}
        prompts = {"prompts": [data("prompts", 40)], "maxPromptLength": 32}
        return {"policy": {"source": str(model)}, "data": prompts, "sampling": sampling, "teacherTopK": 4}
    rows = [{"prompt": "A B", "response": " ".join("abcdef"[: 1 + i % 6])} for i in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"files": str(folder / "rows.jsonl")}
    steps = {"batchSize": 8, "duration": {"maxSteps": 8}, "checkpoint": {"everySteps": 2}}
    return {"model": {"source": str(model)}, "data": {"train": [source]}, "parallel": parallel, **steps}


@pytest.fixture(scope="module")
def whole(tiny_model_dir, tmp_path_factory):
    """Of runs that nobody disturbs: what they leave, by kind."""
    made: dict[str, dict[str, str]] = {}

    def run(kind: str) -> dict[str, str]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = finished(kind, tiny_model_dir, folder)
        return made[kind]

    return run


def finished(kind: str, model: Path, folder: Path) -> dict[str, str]:
    """Digests of what a run leaves that goes to its end."""
    file = write(folder / "phase.yaml", folder / "run" / kind, spec_of(kind, model, folder))
    assert torchrun(folder, "-m", "trainers", kind, "--spec", str(file)) == 0, (folder / "log").read_text()[-4000:]
    left = sorted((folder / "run" / kind).glob("model/*" if kind == "sft" else "**/*.[js]*"))
    skipped = ("metrics.jsonl", "result.json", "identity.json", "progress.json")
    return {path.name: tree_digest(path) for path in left if path.name not in skipped}


def torchrun(folder: Path, *arguments: str) -> int:
    """Two processes' exit code; what they print is in the folder's ``log``."""
    environment = os.environ | {"ALIGNMENT_METRICS_PORT": "0", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with (folder / "log").open("w") as log:
        done = subprocess.run(
            [*launcher, *arguments], env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    return done.returncode


@pytest.mark.parametrize(
    ("kind", "rank", "what"),
    [
        ("rollout", "0", "part"),
        ("rollout", "0", "shard"),
        ("rollout", "1", "respond"),
        ("sft", "0", "segment"),
        ("sft", "1", "take"),
    ],
)
def test_what_is_left_is_that_of_a_run_that_nobody_disturbs(kind, rank, what, whole, tiny_model_dir, tmp_path):
    file = write(tmp_path / "phase.yaml", tmp_path / "run" / kind, spec_of(kind, tiny_model_dir, tmp_path))
    assert torchrun(tmp_path, str(DYING), kind, str(file), rank, what) != 0
    assert not (tmp_path / "run" / kind / "result.json").exists()
    assert "SIGKILL" in (tmp_path / "log").read_text()
    found = finished(kind, tiny_model_dir, tmp_path)
    assert any(name.endswith((".safetensors", "traces.jsonl")) for name in found)
    assert found == whole(kind)
