"""Real training in real pods on real nodes, disturbed in every way that a cluster knows, and its weights afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster.installed import Runs
from kueue import quota

pytestmark = pytest.mark.slow

STEPS = 400
PHASE = {
    "data": {
        "train": [{"synthetic": {"task": "letters", "split": "demonstrations", "count": 2000}}],
        "maxLength": 32,
        "packing": False,
    },
    "batchSize": 32,
    "duration": {"maxSteps": STEPS},
    "checkpoint": {"everySeconds": 1},
}
VOCABULARY = [{"synthetic": {"task": "letters", "split": "demonstrations", "count": 400}}]
MODEL = {
    "scratch": {
        "hiddenSize": 32, "numLayers": 2,
        "tokenizer": {"kind": "word", "vocabSize": 128, "trainOn": VOCABULARY},
    }
}  # fmt: skip
POLICY = {"backoff": {"initialSeconds": 1, "maxSeconds": 1}}
TRAINING = {"model": MODEL, "failurePolicy": POLICY, "phases": [{"name": "sft", "sft": PHASE}]}


def local(folder: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """The same run on this machine, undisturbed. Returns the phase's result."""
    env = [{"name": "OMP_NUM_THREADS", "value": "1"}]
    spec = {**spec, "template": {**spec.get("template", {}), "env": env}}
    run = {"apiVersion": "alignment.dev/v1alpha1", "kind": "AlignmentRun", "metadata": {"name": "local"}, "spec": spec}
    (folder / "run.yaml").write_text(json.dumps(run))
    command = [str(Path(sys.executable).parent / "alignctl"), "run", "run.yaml", "--workspace", "runs"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=os.environ, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "runs/local/sft/result.json").read_text())


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return local(tmp_path_factory.mktemp("undisturbed"), TRAINING)


def weights(result: dict[str, Any]) -> str:
    return result["artifacts"]["model"]["digest"]


def attempts(runs: Runs, name: str) -> list[tuple[str, str | None]]:
    return [(a["state"], a.get("failure")) for a in runs.phase(name, "sft")["attempts"]]


def test_two_pods_on_two_nodes_train_models_that_are_split_over_them(runs: Runs, tmp_path: Path):
    """Whole runs of all types: ``make test-distributed``."""
    rows = {"train": [{"synthetic": {"task": "letters", "split": "preferences", "count": 200}}], "maxLength": 32}
    sft = PHASE | {"duration": {"maxSteps": 20}}
    dpo = PHASE | {"policy": {"phase": "sft"}, "data": rows, "duration": {"maxSteps": 4}}
    ways = {"strategy": "fsdp"}, {"strategy": "deepspeed", "deepspeed": {"stage": 3}}
    split = [{"name": "sft", "sft": sft | {"parallel": ways[0]}}, {"name": "dpo", "dpo": dpo | {"parallel": ways[1]}}]
    cpu = {"requests": {"cpu": more_than_half(runs)}}
    runs.apply("two", TRAINING | {"phases": split}, nodes=2, resources=cpu)
    runs.until_succeeded("two")
    for job in ("two-sft-1", "two-dpo-1"):
        assert {runs.pod(job, index)["spec"]["nodeName"] for index in (0, 1)} == {"node-1", "node-2"}
    local(tmp_path, TRAINING | {"phases": [{"name": "sft", "sft": sft}, {"name": "dpo", "dpo": dpo}]})
    for phase in ("sft", "dpo"):
        alone = losses(tmp_path / "runs/local" / phase)
        assert losses(runs.folder("two") / phase) == pytest.approx(alone, rel=1e-4), phase


def losses(phase: Path) -> dict[int, float]:
    """By step."""
    lines = map(json.loads, (phase / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def more_than_half(runs: Runs) -> str:
    """Of a node's processors, so that a second pod has to take another node, as with GPUs."""
    return f"{min(int(node['status']['allocatable']['cpu']) for node in runs.cluster.items('nodes')) * 600}m"


def test_progress_is_shown_while_a_run_trains(runs: Runs, undisturbed: dict[str, Any]):
    long = {**TRAINING, "phases": [{"name": "sft", "sft": {**PHASE, "duration": {"maxSteps": 5000}}}]}
    runs.apply("live", long)
    seen = runs.wait("the run reports steps", lambda: (s := runs.status("live")).get("step") and s)
    assert seen["step"].endswith("/5000")
    assert float(seen["loss"]) > 0
    assert float(seen["tokensPerSecond"]) > 0
    assert seen["eta"]
    row = runs.kubectl("get", "arun", "live").splitlines()[1].split()
    assert row[1:3] == ["sft", "0/1"]
    # Suspending saves the work; what was done is there when the run goes on.
    before = runs.until_checkpoint("live", "sft")
    runs.kubectl("patch", "arun", "live", "--type=merge", "-p", '{"spec":{"suspend":true}}')
    runs.kubectl("wait", "arun/live", "--for=condition=Suspended", "--timeout=60s", timeout=70)
    runs.wait("the pod is gone", lambda: not runs.cluster.items("pods", "-n", runs.namespace))
    saved = runs.checkpoints("live", "sft")[-1]
    assert saved >= before
    runs.kubectl("patch", "arun", "live", "--type=merge", "-p", '{"spec":{"suspend":false}}')
    log = runs.wait("it goes on", lambda: runs.until_checkpoint("live", "sft", saved + 1))
    assert log > saved


def test_an_oom_kill(runs: Runs, undisturbed: dict[str, Any]):
    """The kernel kills at the memory limit: a file in the pod's shared memory counts like memory of its processes."""
    limits = {"requests": {"memory": "1200Mi"}, "limits": {"memory": "1200Mi"}}
    runs.apply("oom", TRAINING, resources=limits)
    runs.until_checkpoint("oom", "sft")
    fill = ["dd", "if=/dev/zero", "of=/dev/shm/fill", "bs=1M", "count=1300"]
    runs.kubectl("exec", "oom-sft-1-worker-0", "--", *fill, check=False)
    runs.until_succeeded("oom")
    assert attempts(runs, "oom") == [("Failed", "OutOfMemory"), ("Succeeded", None)]
    first = runs.phase("oom", "sft")["attempts"][0]
    assert first["message"] == "OOMKilled: the pod needs more memory than its memory limit of 1200Mi"
    assert weights(runs.result("oom", "sft")) == weights(undisturbed)


def test_an_eviction(runs: Runs, undisturbed: dict[str, Any]):
    runs.apply("evicted", TRAINING)
    runs.until_checkpoint("evicted", "sft")
    pod = "evicted-sft-1-worker-0"
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": runs.namespace}}
    path = f"/api/v1/namespaces/{runs.namespace}/pods/{pod}/eviction"
    runs.cluster.kubectl("create", "--raw", path, "-f", "-", input=json.dumps(eviction))
    runs.until_succeeded("evicted")
    phase = runs.phase("evicted", "sft")
    assert phase["attempts"][0]["failure"] == "Interrupted"
    assert "EvictionByEvictionAPI" in phase["attempts"][0]["message"]
    assert weights(runs.result("evicted", "sft")) == weights(undisturbed)


def test_a_preemption_by_a_run_of_higher_priority(runs: Runs, undisturbed: dict[str, Any]):
    runs.cluster.apply(quota(runs.namespace, "1"))
    cpu = {"requests": {"cpu": "1"}}
    runs.apply("low", {**TRAINING, "queueName": "alignment", "queuePriority": "alignment-low"}, resources=cpu)
    runs.until_checkpoint("low", "sft")
    short = {**TRAINING, "phases": [{"name": "sft", "sft": {**PHASE, "duration": {"maxSteps": 3}}}]}
    runs.apply("high", {**short, "queueName": "alignment", "queuePriority": "alignment-high"}, resources=cpu)
    runs.wait(
        "the preemption is told", lambda: any(
            c["type"] == "Admitted" and c["reason"] == "Preempted" for c in runs.status("low").get("conditions", [])
        ),
    )  # fmt: skip
    runs.until_succeeded("high")
    runs.until_succeeded("low")
    assert attempts(runs, "low") == [("Succeeded", None)]
    assert weights(runs.result("low", "sft")) == weights(undisturbed)


def test_the_leading_operator_dies(runs: Runs, undisturbed: dict[str, Any]):
    runs.apply("led", TRAINING)
    runs.until_checkpoint("led", "sft")
    lease = runs.cluster.get("lease", "alignment-operator", "-n", "alignment-system")
    leader = lease["spec"]["holderIdentity"].rsplit("-", 1)[0]
    runs.cluster.kubectl("delete", "pod", leader, "-n", "alignment-system", "--force", "--grace-period=0")
    runs.until_succeeded("led")
    assert attempts(runs, "led") == [("Succeeded", None)]
    after = runs.cluster.get("lease", "alignment-operator", "-n", "alignment-system")
    assert after["spec"]["holderIdentity"] != lease["spec"]["holderIdentity"]
    assert weights(runs.result("led", "sft")) == weights(undisturbed)


def test_a_python_error_is_told_in_its_own_words(runs: Runs):
    bad = {**PHASE, "data": {"train": [{"files": "nothing/*.jsonl"}]}}
    runs.apply("bad", {**TRAINING, "phases": [{"name": "sft", "sft": bad}]})
    runs.kubectl("wait", "arun/bad", "--for=condition=Failed", "--timeout=90s", timeout=100)
    phase = runs.phase("bad", "sft")
    assert (phase["failure"], phase["message"]) == ("BadInput", "no file matches 'nothing/*.jsonl' in /workspace")


def test_an_image_that_is_not_there_and_a_claim_that_is_not_there(runs: Runs):
    policy = {**POLICY, "startupTimeoutSeconds": 15, "retries": {"startupTimeout": 0}}
    runs.apply("image", {**TRAINING, "failurePolicy": policy}, image="registry.invalid/nothing:1")
    claims = [{"claimName": "not-there", "mountPath": "/data"}]
    runs.apply("claim", {**TRAINING, "failurePolicy": policy}, claims=claims)
    for name, words in (
        ("image", "registry.invalid/nothing:1"),
        ("claim", 'persistentvolumeclaim "not-there" not found'),
    ):
        runs.kubectl("wait", f"arun/{name}", "--for=condition=Failed", "--timeout=90s", timeout=100)
        phase = runs.phase(name, "sft")
        assert phase["failure"] == "StartupTimeout"
        assert words in phase["message"]


def test_a_node_dies(runs: Runs, undisturbed: dict[str, Any]):
    """Power is cut in the middle of training: nothing of the node says a word."""
    runs.cluster.kubectl("cordon", "node-1")
    try:
        policy = {**POLICY, "nodeLostSeconds": 2, "avoidFailedNodes": True}
        runs.apply("lost", {**TRAINING, "failurePolicy": policy})
        runs.until_checkpoint("lost", "sft")
    finally:
        runs.cluster.kubectl("uncordon", "node-1")
    assert runs.pod("lost-sft-1")["spec"]["nodeName"] == "node-2"
    runs.cluster.kill_node("node-2")
    try:
        runs.until_succeeded("lost")
        first = runs.phase("lost", "sft")["attempts"][0]
        assert (first["failure"], first["node"]) == ("Infrastructure", "node-2")
        assert "DeletionByTaintManager" in first["message"]
        job = runs.cluster.get("pytorchjob", "lost-sft-2", "-n", runs.namespace)
        affinity = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["affinity"]
        assert "node-2" in json.dumps(affinity)
        assert weights(runs.result("lost", "sft")) == weights(undisturbed)
    finally:
        runs.cluster.start_node("node-2")
        runs.cluster.kubectl("wait", "node/node-2", "--for=condition=Ready", "--timeout=90s", timeout=100)
