"""The same on TrainJobs: real training in pods of the Kubeflow Trainer and JobSet, disturbed, and its weights afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest
from cluster.installed import Runs
from test_nodes import MODEL, PHASE, POLICY, TRAINING, attempts, local, losses, more_than_half, weights

pytestmark = pytest.mark.slow

ON_TRAINJOBS = {"backend": "TrainJob"}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return local(tmp_path_factory.mktemp("undisturbed"), TRAINING)


def test_two_phases_of_two_pods_on_two_nodes(runs: Runs, tmp_path: Path):
    """The second builds on the first; each is split over two nodes, in its own way."""
    rows = {"train": [{"synthetic": {"task": "letters", "split": "preferences", "count": 200}}], "maxLength": 32}
    sft = {"name": "sft", "sft": PHASE | {"duration": {"maxSteps": 10}}}
    dpo = {"name": "dpo", "dpo": PHASE | {"policy": {"phase": "sft"}, "data": rows, "duration": {"maxSteps": 4}}}
    spec = {"model": MODEL, "failurePolicy": POLICY}
    ways = [("sft", sft, "fsdp"), ("dpo", dpo, "ddp")]
    split = [{**entry, name: entry[name] | {"parallel": {"strategy": way}}} for name, entry, way in ways]
    cpu = {"requests": {"cpu": more_than_half(runs)}}
    runs.apply("two", spec | ON_TRAINJOBS | {"phases": split}, nodes=2, resources=cpu)
    status = runs.until_succeeded("two")
    assert status["backend"] == "TrainJob"
    for job in ("two-sft-1", "two-dpo-1"):
        assert {runs.pod(job, index)["spec"]["nodeName"] for index in (0, 1)} == {"node-1", "node-2"}
    local(tmp_path, spec | {"phases": [sft, dpo]})
    for phase in ("sft", "dpo"):
        alone = losses(tmp_path / "runs/local" / phase)
        assert losses(runs.folder("two") / phase) == pytest.approx(alone, rel=1e-4), phase


def test_suspended_it_saves_and_evicted_it_is_tried_again(runs: Runs, undisturbed: dict[str, Any]):
    """To the same weights as without either."""
    runs.apply("stopped", TRAINING | ON_TRAINJOBS)
    before = runs.until_checkpoint("stopped", "sft")
    runs.kubectl("patch", "arun", "stopped", "--type=merge", "-p", '{"spec":{"suspend":true}}')
    runs.kubectl("wait", "arun/stopped", "--for=condition=Suspended", "--timeout=60s", timeout=70)
    # The attempt is over when its trainers are, although its job is gone at once.
    runs.wait(
        "it is over", lambda: all(a["state"] == "Stopped" for a in runs.phase("stopped", "sft").get("attempts", ()))
    )
    assert not [p for p in runs.cluster.items("pods", "-n", runs.namespace) if trains(p)]
    assert not runs.cluster.items("trainjobs", "-n", runs.namespace)
    saved = runs.checkpoints("stopped", "sft")[-1]
    assert saved >= before
    runs.kubectl("patch", "arun", "stopped", "--type=merge", "-p", '{"spec":{"suspend":false}}')
    runs.until_checkpoint("stopped", "sft", saved + 1)
    evict(runs, "stopped-sft-2")
    runs.until_succeeded("stopped")
    tried = attempts(runs, "stopped")
    assert tried[-2:] == [("Failed", "Interrupted"), ("Succeeded", None)]
    said = next(a["message"] for a in runs.phase("stopped", "sft")["attempts"] if a["number"] == 2)
    assert "EvictionByEvictionAPI" in said
    assert weights(runs.result("stopped", "sft")) == weights(undisturbed)


def trains(pod: dict[str, Any]) -> bool:
    return any("running" in container["state"] for container in pod["status"].get("containerStatuses", ()))


def evict(runs: Runs, job: str) -> None:
    pod = runs.pod(job)["metadata"]["name"]
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": runs.namespace}}
    path = f"/api/v1/namespaces/{runs.namespace}/pods/{pod}/eviction"
    runs.cluster.kubectl("create", "--raw", path, "-f", "-", input=json.dumps(eviction))


def test_a_kill_for_want_of_memory_is_told_as_one(runs: Runs):
    limits = {"requests": {"memory": "1200Mi"}, "limits": {"memory": "1200Mi"}}
    policy = POLICY | {"retries": {"outOfMemory": 0}}
    runs.apply("oom", TRAINING | ON_TRAINJOBS | {"failurePolicy": policy}, resources=limits)
    runs.until_checkpoint("oom", "sft")
    fill = ["dd", "if=/dev/zero", "of=/dev/shm/fill", "bs=1M", "count=1300"]
    runs.kubectl("exec", runs.pod("oom-sft-1")["metadata"]["name"], "--", *fill, check=False)
    runs.kubectl("wait", "arun/oom", "--for=condition=Failed", "--timeout=120s", timeout=130)
    phase = runs.phase("oom", "sft")
    assert phase["failure"] == "OutOfMemory"
    assert phase["message"] == "OOMKilled: the pod needs more memory than its memory limit of 1200Mi"
