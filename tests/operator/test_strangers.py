"""What is not a run's stays as it is, whatever its name and labels say, and the run says so and goes on."""

import asyncio
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from driver import FAST, Driver, both_in_soak, manifest, now, sft

from controller.api.run import AlignmentRun
from controller.backends.cluster.backend import ClusterBackend
from controller.backends.cluster.scrape import Scraper
from controller.backends.cluster.settings import Settings
from controller.kube.api import Api
from controller.kube.resources import PYTORCHJOBS
from controller.kube.transport import Transport
from controller.memory import Memory
from controller.operator.login import login_of
from controller.plan.attempts import DELETED
from controller.plan.decide import Apply, decide
from controller.plan.observed import ObservedJob

Object = dict[str, Any]

LABELS = {
    "app.kubernetes.io/managed-by": "alignment-operator",
    "alignment.dev/run": "run",
    "alignment.dev/phase": "sft",
    "alignment.dev/attempt": "1",
}
"""Those of our own jobs and pods: anybody may write them."""
CONTAINER = {
    "name": "pytorch",
    "image": "nothing:1",
    "securityContext": {
        "allowPrivilegeEscalation": False,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    },
}


def strangers_job(name: str = "run-sft-1", labels: Object | None = None, **metadata: Any) -> Object:
    template = {"metadata": {"labels": labels or {}}, "spec": {"containers": [CONTAINER]}}
    worker = {"replicas": 1, "restartPolicy": "Never", "template": template}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name, "labels": labels or {}, **metadata},
        "spec": {"pytorchReplicaSpecs": {"Worker": worker}},
    }


def uid_of(driver: Driver, job: str = "run-sft-1") -> str:
    return str(driver.until_job(job)["metadata"]["uid"])


def owned_by_a_config_map(driver: Driver) -> list[Object]:
    driver.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "web"}})
    uid = driver.cluster.get("configmap", "web", "-n", driver.namespace)["metadata"]["uid"]
    return [{"apiVersion": "v1", "kind": "ConfigMap", "name": "web", "uid": uid, "controller": True}]


def end_of_life(driver: Driver) -> None:
    """Everything at which jobs are deleted: an edit, a suspension, the run's own end."""
    driver.edit_phase("run", sft(batchSize=4))
    driver.until_job("run-sft-3")
    driver.edit_phase("run", sft(batchSize=2))
    driver.until_job("run-sft-4")
    driver.patch("run", {"suspend": True})
    driver.until_condition("run", "Suspended")
    driver.cluster.kubectl("delete", "arun", "run", "-n", driver.namespace)
    driver.cluster.wait(lambda: driver.job_names() == ["run-sft-1"], 30, "only the stranger's is left")


def test_a_strangers_job_is_passed_by_and_left_alone(driver: Driver):
    driver.apply(strangers_job())
    theirs = uid_of(driver)
    driver.apply(manifest("run", sft()))
    driver.until_job("run-sft-2")
    driver.start("run-sft-2")
    phase = driver.until_phase("run", "sft", "Running")
    passed = next(a for a in phase["attempts"] if a["number"] == 1)
    assert (passed["state"], passed["takenBy"]) == ("Stopped", "PyTorchJob run-sft-1 of nobody")
    [event] = driver.events("JobNameTaken")
    assert "its job's name is taken by PyTorchJob run-sft-1 of nobody, which is left alone" in event["message"]
    driver.succeed("run-sft-2")
    assert driver.until_condition("run", "Succeeded")
    end_of_life(driver)
    assert uid_of(driver) == theirs
    assert "deletionTimestamp" not in driver.until_job("run-sft-1")["metadata"]


def test_the_labels_of_a_run_make_nothing_its_own(driver: Driver):
    """A job and a pod that claim to be the run's, and what they say."""
    driver.apply(strangers_job(labels=LABELS, ownerReferences=owned_by_a_config_map(driver)))
    theirs = uid_of(driver)
    labels = {**LABELS, "training.kubeflow.org/job-name": "run-sft-2", "training.kubeflow.org/replica-index": "0"}
    driver.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x-worker-0", "labels": labels},
                  "spec": {"containers": [CONTAINER]}})  # fmt: skip
    driver.apply(manifest("run", sft()))
    digest = driver.until_job("run-sft-2")["metadata"]["annotations"]["alignment.dev/digest"]
    assert "ConfigMap web" in driver.phase("run", "sft")["attempts"][0]["takenBy"]
    word = json.dumps({"digest": digest, "artifactDigest": "forged", "metrics": {"loss": 0.0}})
    state = {
        "terminated": {"exitCode": 0, "message": word, "reason": "Completed", "finishedAt": now(), "startedAt": now()}
    }
    container = {"name": "pytorch", "image": "x", "imageID": "", "ready": False, "restartCount": 0, "state": state}
    for pod in ("run-sft-1-worker-0", "x-worker-0"):
        driver.until_pod(pod)
        status = {"phase": "Succeeded", "containerStatuses": [container]}
        driver.cluster.patch_status("pod", pod, driver.namespace, status)
    driver.start("run-sft-2")
    driver.until_phase("run", "sft", "Running")
    driver.succeed("run-sft-2", artifact="ours", metrics={"loss": 1.5})
    driver.until_condition("run", "Succeeded")
    phase = driver.phase("run", "sft")
    assert (phase["artifactDigest"], phase["metrics"]) == ("ours", {"loss": 1.5})
    end_of_life(driver)
    assert uid_of(driver) == theirs


def test_a_pod_that_has_the_name_of_one_of_ours_is_told_and_passed_by(driver: Driver):
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "run-sft-1-worker-0"},
        "spec": {"containers": [CONTAINER]},
    }
    driver.apply(pod)
    uid = driver.until_pod("run-sft-1-worker-0")["metadata"]["uid"]
    driver.apply(manifest("run", sft(), failurePolicy={**FAST, "startupTimeoutSeconds": 40}))
    said = '"run-sft-1-worker-0" already exists'
    driver.cluster.wait(lambda: said in driver.phase("run", "sft").get("message", ""), 60, "it is told")
    driver.cluster.wait(lambda: "run-sft-2" in driver.job_names(), 60, "the next attempt has pods of other names")
    driver.succeed("run-sft-2")
    driver.until_condition("run", "Succeeded")
    assert driver.until_pod("run-sft-1-worker-0")["metadata"]["uid"] == uid


def test_a_job_that_has_got_the_name_meanwhile_is_not_deleted(driver: Driver):
    """Between a look and what it decides upon: the API server compares UIDs."""
    driver.apply(strangers_job())
    theirs = uid_of(driver)

    async def delete(uid: str) -> None:
        transport = Transport(login_of(driver.cluster.kubeconfig))
        api = Api(transport)
        try:
            await api.delete_job(PYTORCHJOBS, driver.namespace, "run-sft-1", uid)
        finally:
            await transport.close()

    asyncio.run(delete("another"))
    assert uid_of(driver) == theirs
    assert "deletionTimestamp" not in driver.until_job("run-sft-1")["metadata"]
    asyncio.run(delete(theirs))
    driver.cluster.wait(lambda: not driver.jobs(), 30, "with its own it is")
    asyncio.run(delete(theirs))


def test_a_job_that_is_deleted_before_anybody_has_seen_it_has_failed(driver: Driver):
    """Else one that something in the cluster removes at once would be made at each look, for ever."""
    driver.apply(manifest("run", sft(), suspend=True))
    driver.until_condition("run", "Suspended")

    async def made_and_deleted() -> tuple[ObservedJob, ...]:
        transport = Transport(login_of(driver.cluster.kubeconfig))
        api = Api(transport)
        backend = ClusterBackend(api, Memory(api), Scraper(), Settings())
        document = driver.run("run")
        spec = {**document["spec"], "suspend": False}
        run = AlignmentRun.model_validate({**document, "spec": spec, "status": None})
        try:
            [action] = decide(run, await backend.observe(run), datetime.now(UTC)).actions
            assert isinstance(action, Apply)
            await backend.apply(run, action.job)
            # The operator, to which the run is suspended, may be faster.
            driver.cluster.kubectl(
                "delete", driver.kind.plural, "run-sft-1", "-n", driver.namespace, "--ignore-not-found"
            )
            return (await backend.observe(run)).jobs
        finally:
            await transport.close()

    [job] = asyncio.run(made_and_deleted())
    assert (job.state, job.failure, job.message) == ("Failed", "Interrupted", DELETED)


@both_in_soak
def test_a_job_that_an_earlier_run_left_is_waited_for_while_it_may_write(driver: Driver):
    driver.apply(manifest("run", sft()))
    theirs = uid_of(driver)
    driver.cluster.kubectl("delete", "arun", "run", "-n", driver.namespace, "--cascade=orphan")
    driver.cluster.wait(
        lambda: "ownerReferences" not in driver.until_job("run-sft-1")["metadata"], 30, "it is an orphan"
    )
    driver.apply(manifest("run", sft()))
    told = driver.until_condition("run", "Progressing", reason="WaitingForEarlierRun")
    assert told["message"] == (
        f"sft: waits for {driver.backend} run-sft-1 of nobody to end: it may still write to this phase's folder"
    )
    assert (driver.phase("run", "sft")["state"], driver.job_names()) == ("Ready", ["run-sft-1"])
    assert driver.events("WaitingForEarlierRun")
    driver.end("run-sft-1", 1, "it went wrong")
    driver.until_job("run-sft-2")
    assert uid_of(driver) == theirs
    driver.succeed("run-sft-2")
    driver.until_condition("run", "Succeeded")


@both_in_soak
def test_a_run_of_the_same_name_waits_for_the_job_of_the_one_before(driver: Driver):
    """Which is on its way out, slowly; its end is told by the cluster, and nobody else is asked."""
    driver.apply(manifest("run", sft()))
    theirs = uid_of(driver)
    before = driver.run("run")["metadata"]["uid"]
    hold = ("patch", driver.kind.plural, "run-sft-1", "-n", driver.namespace, "--type=merge", "-p")
    driver.cluster.kubectl(*hold, json.dumps({"metadata": {"finalizers": ["example.com/slow"]}}))
    driver.cluster.kubectl("delete", "arun", "run", "-n", driver.namespace, "--cascade=background")
    driver.apply(manifest("run", sft()))
    told = driver.until_condition("run", "Progressing", reason="WaitingForEarlierRun")
    assert f"of AlignmentRun run (uid {before})" in told["message"]
    driver.cluster.kubectl(*hold, json.dumps({"metadata": {"finalizers": None}}))
    driver.cluster.wait(lambda: uid_of(driver) != theirs, 30, "the new run has a job of its own")
    driver.succeed("run-sft-1")
    driver.until_condition("run", "Succeeded")


@both_in_soak
@pytest.mark.parametrize("thing", ["job", "pod"])
def test_what_loses_our_labels_stays_the_runs(driver: Driver, thing: str):
    driver.apply(manifest("run", sft()))
    ours = uid_of(driver)
    driver.start("run-sft-1")
    driver.until_phase("run", "sft", "Running")
    found = driver.until_job("run-sft-1") if thing == "job" else driver.until_pod_of("run-sft-1")
    none = {
        name: None for name in found["metadata"]["labels"] if name.startswith(("alignment.dev/", "app.kubernetes.io/"))
    }
    patch = ("-n", driver.namespace, "--type=merge", "-p", json.dumps({"metadata": {"labels": none}}))
    kind = driver.kind.plural if thing == "job" else "pod"
    driver.cluster.kubectl("patch", kind, found["metadata"]["name"], *patch)
    if thing == "job":
        [told] = driver.events("LabelsLost")
        assert f"labels away from {driver.backend} run-sft-1" in told["message"]
    driver.succeed("run-sft-1")
    driver.until_condition("run", "Succeeded", timeout=60)
    assert (driver.job_names(), uid_of(driver)) == (["run-sft-1"], ours)


@both_in_soak
def test_runs_whose_names_look_alike_have_jobs_of_their_own(driver: Driver):
    """`1a` had been called `r1a`, since a service may not begin with a digit."""
    for name in ("1a", "r1a"):
        driver.apply(manifest(name, sft("p")))
    driver.cluster.wait(lambda: len(driver.jobs()) == 2, 30, "each has a job")
    owners = {job["metadata"]["ownerReferences"][0]["name"] for job in driver.jobs()}
    assert owners == {"1a", "r1a"}
