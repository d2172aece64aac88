"""A whole run as a user starts it: rollouts, a teacher and an evaluation from one real server, and its key written nowhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from served_key import KEY

pytestmark = pytest.mark.vllm

ROWS = {"synthetic": {"task": "letters", "split": "prompts", "count": 16}}


def document(vllm_url: str, policy: Path, student: Path) -> dict:
    served = {"url": vllm_url, "servedAs": "policy", "keyVariable": "VLLM_KEY"}
    sampling = {"engine": "vllm", "maxNewTokens": 8}
    asked = {"policy": {"source": str(policy), **served}, "sampling": sampling, "data": {"prompts": [ROWS]}}
    phases = [
        {"name": "traces", "rollout": asked},
        {
            "name": "distill",
            "distill": {
                "teacher": {**served, "topK": 16},
                "student": {"source": str(student)},
                "traces": {"phase": "traces"},
                "prompts": {"prompts": [ROWS]},
                "sampling": {"maxNewTokens": 8},
                "maxLength": 64,
                "batchSize": 8,
                "duration": {"maxSteps": 4},
            },
        },
        {
            "name": "eval",
            "evaluate": {
                "models": [{"name": "teacher", "source": str(policy), **served}],
                "reference": {"phase": "distill"},
                "data": {"rows": [ROWS]},
                "sampling": sampling,
                "benchmarks": [{"name": "drift", "kl": {}}, {"name": "length", "length": {}}],
            },
        },
    ]  # fmt: skip
    return {
        "apiVersion": "alignment.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": "served"},
        "spec": {"phases": phases},
    }


def test_rollouts_teacher_and_evaluation_from_one_server(vllm, policy_dir, other_dir, tmp_path):
    file, workspace = tmp_path / "run.yaml", tmp_path / "runs"
    file.write_text(yaml.safe_dump(document(vllm.url, policy_dir, other_dir)))
    alignctl = [str(Path(sys.executable).parent / "alignctl"), "run", str(file), "--workspace", str(workspace)]
    done = subprocess.run(alignctl, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    status = json.loads((workspace / "served" / "status.json").read_text())
    assert "Succeeded" in json.dumps(status)
    result = json.loads((workspace / "served" / "eval" / "result.json").read_text())
    assert result["metrics"]["teacher/drift/perToken"] > 0
    written = [path for path in workspace.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert not written and KEY not in done.stdout + done.stderr
