"""What is particular to runs on TrainJobs: their runtimes, the choice of a kind, and a cluster without a Trainer.

What all kinds of job have alike is tried on both in the other modules.
"""

import json
from typing import Any

import pytest
from cluster.client import KubectlError
from driver import Driver, manifest, sft

Object = dict[str, Any]

POD = {
    "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    "containers": [
        {
            "name": "node", "image": "nothing:1",
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        }
    ],
}  # fmt: skip


@pytest.fixture
def trainjobs(driver: Driver) -> Driver:
    driver.backend = "TrainJob"
    return driver


def runtimes(driver: Driver) -> dict[str, Object]:
    found = driver.cluster.items("trainingruntimes", "-n", driver.namespace)
    return {runtime["metadata"]["name"]: runtime for runtime in found}


def a_runtime(name: str) -> Object:
    job = {"metadata": {}, "spec": {"template": {"spec": POD}}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainingRuntime", "metadata": {"name": name},
        "spec": {"template": {"spec": {"replicatedJobs": [{"name": "node", "template": job}]}}},
    }  # fmt: skip


def test_a_runtime_comes_and_goes_with_its_job(trainjobs: Driver):
    trainjobs.apply(manifest("run", sft()))
    job = trainjobs.until_job("run-sft-1")

    def owner() -> bool:
        [whose] = runtimes(trainjobs)["run-sft-1"]["metadata"]["ownerReferences"]
        return (whose["kind"], whose["uid"]) == ("TrainJob", job["metadata"]["uid"])

    trainjobs.cluster.wait(owner, 30, "it is the job's")
    trainjobs.start("run-sft-1")
    trainjobs.until_phase("run", "sft", "Running")
    assert trainjobs.status("run")["backend"] == "TrainJob"
    trainjobs.patch("run", {"suspend": True})
    trainjobs.until_condition("run", "Suspended")
    trainjobs.cluster.wait(lambda: not runtimes(trainjobs), 30, "it has gone with the job")
    ours = ("-n", trainjobs.namespace, "--field-selector", "metadata.name!=kube-root-ca.crt")
    for kind in ("jobsets", "jobs", "pods", "configmaps"):
        trainjobs.cluster.wait(lambda kind=kind: not trainjobs.cluster.items(kind, *ours), 30, f"no {kind} are left")


def test_a_runs_labels_of_other_controllers_do_not_keep_it_from_its_pods(trainjobs: Driver):
    """A Job with somebody else's `job-name` in its template is never made, which only the JobSet's events would tell."""
    run = manifest("run", sft())
    foreign = {"job-name": "x", "batch.kubernetes.io/controller-uid": "y", "jobset.sigs.k8s.io/jobset-name": "z"}
    queue = {"kueue.x-k8s.io/queue-name": "theirs"}
    run["metadata"]["labels"] = {"team": "a", **foreign, **queue}
    trainjobs.apply(run)
    said = trainjobs.until_condition("run", "Accepted", status="False", reason="InvalidSpec")
    assert 'queue-name]: "theirs" is read of jobs only; set spec.queueName: theirs' in said["message"]
    trainjobs.cluster.kubectl("label", "arun", "run", "-n", trainjobs.namespace, "kueue.x-k8s.io/queue-name-")
    labels = trainjobs.until_pod_of("run-sft-1")["metadata"]["labels"]
    assert labels["team"] == "a"
    assert foreign.items() & labels.items() == set()


def test_a_strangers_runtime_is_passed_by_and_left_alone(trainjobs: Driver):
    trainjobs.apply(a_runtime("run-sft-1"))
    theirs = runtimes(trainjobs)["run-sft-1"]
    trainjobs.apply(manifest("run", sft()))
    trainjobs.until_job("run-sft-2", timeout=60)
    [event] = trainjobs.events("JobNameTaken")
    assert "taken by TrainingRuntime run-sft-1 of nobody, which is left alone" in event["message"]
    trainjobs.succeed("run-sft-2")
    trainjobs.until_condition("run", "Succeeded")
    assert trainjobs.job_names() == ["run-sft-2"]
    assert runtimes(trainjobs)["run-sft-1"] == theirs


def test_a_strangers_job_is_passed_by_and_left_alone(trainjobs: Driver):
    trainjobs.apply(a_runtime("theirs"))
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": "theirs"}
    stranger = {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": {"name": "run-sft-1"}}
    # The Trainer's webhook has to have seen the runtime.
    trainjobs.cluster.wait(
        lambda: "created" in trainjobs.cluster.kubectl(
            "create", "-n", trainjobs.namespace, "-f", "-", check=False,
            input=json.dumps({**stranger, "spec": {"runtimeRef": reference}}),
        ), 30, "there is a stranger's job",
    )  # fmt: skip
    uid = trainjobs.until_job("run-sft-1")["metadata"]["uid"]
    trainjobs.apply(manifest("run", sft()))
    trainjobs.succeed("run-sft-2")
    trainjobs.until_condition("run", "Succeeded")
    assert trainjobs.phase("run", "sft")["attempts"][-1]["job"] == "run-sft-2"
    assert trainjobs.until_job("run-sft-1")["metadata"]["uid"] == uid


def test_a_pod_with_all_labels_of_ours_and_another_controller_says_nothing(trainjobs: Driver):
    """Its name too: only the controllers above it tell."""
    trainjobs.apply(manifest("run", sft()))
    real = trainjobs.until_pod_of("run-sft-1")
    trainjobs.start("run-sft-1")
    trainjobs.until_phase("run", "sft", "Running")
    [maker] = real["metadata"]["ownerReferences"]
    job = trainjobs.cluster.get("job", maker["name"], "-n", trainjobs.namespace)
    decoy = {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "decoy", "labels": job["metadata"]["labels"]},
        "spec": {"suspend": True, "template": {"spec": {**POD, "restartPolicy": "Never"}}},
    }  # fmt: skip
    trainjobs.apply(decoy)
    uid = trainjobs.cluster.get("job", "decoy", "-n", trainjobs.namespace)["metadata"]["uid"]
    whose = [{"apiVersion": "batch/v1", "kind": "Job", "name": "decoy", "uid": uid, "controller": True}]
    labels = {k: v for k, v in real["metadata"]["labels"].items() if not k.endswith("controller-uid")}
    forged = {"name": "run-sft-1-node-0-0-zzzzz", "labels": labels, "ownerReferences": whose}
    trainjobs.apply({"apiVersion": "v1", "kind": "Pod", "metadata": forged, "spec": POD})
    digest = trainjobs.until_job("run-sft-1")["metadata"]["annotations"]["alignment.dev/digest"]
    word = json.dumps({"digest": digest, "artifactDigest": "forged", "metrics": {}})
    times = {"startedAt": "2026-01-01T00:00:00Z", "finishedAt": "2026-01-01T00:00:01Z"}
    state = {"terminated": {"exitCode": 0, "message": word, "reason": "Completed", **times}}
    container = {"name": "node", "image": "x", "imageID": "", "ready": False, "restartCount": 0, "state": state}
    status = {"phase": "Succeeded", "containerStatuses": [container]}
    trainjobs.cluster.patch_status("pod", forged["name"], trainjobs.namespace, status)
    own = real["metadata"]["name"]
    said = {"digest": digest, "artifactDigest": "ours", "metrics": {"loss": 1.5}}
    state["terminated"] |= {"message": json.dumps(said)}
    trainjobs.cluster.patch_status("pod", own, trainjobs.namespace, status)
    trainjobs.until_condition("run", "Succeeded")
    assert trainjobs.phase("run", "sft")["artifactDigest"] == "ours"


def test_a_run_keeps_the_kind_that_it_has_begun_with(driver: Driver):
    driver.apply(manifest("run", sft()))
    driver.until_job("run-sft-1")
    driver.cluster.wait(lambda: driver.status("run").get("backend") == "PyTorchJob", 30, "it is told")
    with pytest.raises(KubectlError, match=r"spec\.backend cannot be changed once the run has begun: make a new run"):
        driver.patch("run", {"backend": "TrainJob"})
    driver.patch("run", {"backend": "PyTorchJob"})
    with pytest.raises(KubectlError, match="backend"):
        driver.apply(manifest("other", sft(), backend="Job"))
