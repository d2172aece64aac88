"""A whole run on real nodes: rollouts and a teacher from a real vLLM in a pod, and an evaluation from a server in a second
container of the phase's own pod."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cluster import product
from cluster.installed import Runs
from vllm_environment import SETTINGS, vllm_python

pytestmark = pytest.mark.slow

VLLM_CLAIM, VLLM_PATH = "vllm-environment", "/opt/vllm"
ROWS = {"synthetic": {"task": "letters", "split": "prompts", "count": 16}}
SECONDS = 900
"""For a server to come to answer beside all else that this machine does."""

Object = dict[str, Any]


@pytest.fixture
def prepared(runs: Runs, policy_dir: Path, other_dir: Path) -> Runs:
    """Models in the workspace, and vLLM's packages on a claim."""
    packages = vllm_python().parents[1] / "lib"
    [site] = packages.glob("python3*/site-packages")
    runs.cluster.apply(product.claim(runs.namespace, VLLM_CLAIM, site, "ReadOnlyMany"), runs.namespace)
    for name, folder in (("policy", policy_dir), ("student", other_dir)):
        shutil.copytree(folder, runs.workspace / name)
        for path in (runs.workspace / name, *(runs.workspace / name).iterdir()):
            path.chmod(0o755)  # pods run as another user
    shutil.copy("/lib/x86_64-linux-gnu/libnuma.so.1", runs.workspace)  # which the image lacks
    shutil.copy(Path(__file__).parents[1] / "served.py", runs.workspace)
    return runs


def server(namespace: str) -> list[Object]:
    """A pod with vLLM, as a team would have one, and its name in the network."""
    command = ["python3", "-m", "vllm.entrypoints.openai.api_server", "--model", "/workspace/policy", "--port", "8000"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-logprobs", "128", "--max-num-seqs", "16"]
    env = SETTINGS | {"PYTHONPATH": VLLM_PATH, "LD_LIBRARY_PATH": "/workspace"}
    env |= {"HOME": "/tmp", "USER": "vllm", "TORCHDYNAMO_DISABLE": "1"}  # the image has no compiler
    claims = {"workspace": product.WORKSPACE_CLAIM, "vllm": VLLM_CLAIM}
    paths = {"workspace": "/workspace", "vllm": VLLM_PATH, "tmp": "/tmp", "shm": "/dev/shm"}
    container = {
        "name": "vllm",
        "image": product.TRAINER,
        "command": [*command, "--served-model-name", "policy"],
        "env": [{"name": name, "value": value} for name, value in env.items()],
        "readinessProbe": {"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 2, "timeoutSeconds": 30},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": name, "mountPath": path} for name, path in paths.items()],
    }
    volumes = [{"name": name, "persistentVolumeClaim": {"claimName": claim}} for name, claim in claims.items()]
    volumes += [{"name": "tmp", "emptyDir": {}}, {"name": "shm", "emptyDir": {"medium": "Memory"}}]
    safe = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {"containers": [container], "volumes": volumes, "securityContext": safe, "restartPolicy": "Never"}
    spec["enableServiceLinks"] = False  # or the Service of this name would set VLLM_PORT, which is vLLM's own
    labels = {"app": "vllm"}
    return [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "vllm", "labels": labels}, "spec": spec},
        {
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "vllm"},
            "spec": {"selector": labels, "ports": [{"port": 8000}]},
        },
    ]  # fmt: skip


def spec_of_run() -> Object:
    served = {"url": "http://vllm:8000", "servedAs": "policy"}
    sampling = {"engine": "vllm", "maxNewTokens": 8}
    own = {"command": ["env", f"PYTHONPATH={product.ENVIRONMENT_PATH}", "python3", "/workspace/served.py"]}
    distill = {
        "teacher": {**served, "topK": 16},
        "student": {"source": "student"},
        "traces": {"phase": "traces"},
        "onPolicyFraction": 0,
        "maxLength": 64,
        "batchSize": 8,
        "duration": {"maxSteps": 2},
    }
    evaluate = {
        "models": [{"phase": "distill"}],
        "data": {"rows": [ROWS]},
        "sampling": sampling,
        "server": own,
        "benchmarks": [{"name": "length", "length": {}}],
        "latency": {"enabled": False},
    }
    traces = {"policy": {"source": "policy", **served}, "sampling": sampling, "data": {"prompts": [ROWS]}}
    phases = [{"name": "traces", "rollout": traces}, {"name": "distill", "distill": distill}]
    return {"phases": [*phases, {"name": "eval", "evaluate": evaluate}]}


def test_rollouts_a_teacher_and_an_evaluation_from_servers_in_pods(prepared: Runs):
    runs = prepared
    runs.cluster.apply(server(runs.namespace), runs.namespace)
    ready = ("wait", "pod/vllm", "--for=condition=Ready", f"--timeout={SECONDS}s")
    try:
        runs.kubectl(*ready, timeout=SECONDS + 10)
    except Exception as error:
        raise AssertionError(runs.kubectl("logs", "vllm", check=False)[-3000:]) from error
    runs.apply("served", spec_of_run(), server={"image": product.TRAINER})
    runs.until_succeeded("served", SECONDS)
    rows = (runs.folder("served") / "traces/traces.jsonl").read_text().splitlines()
    assert len({json.loads(row)["teacher_response"] for row in rows}) > 10
    assert runs.result("served", "eval")["metrics"]["distill/length/tokens"] > 0
    statuses = runs.pod("served-eval-1")["status"]
    assert statuses["phase"] == "Succeeded", "although a server was kept beside"
    assert [c["name"] for c in statuses["initContainerStatuses"]] == ["server"]
    assert "initContainers" not in runs.pod("served-traces-1")["spec"]
