"""Runs in queues whose jobs other clusters carry out: a real Kueue in each of two clusters; the kubelets alone are played."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cluster import launch
from cluster.client import Cluster
from driver import Driver, both, dpo, manifest, sft
from kueue import API, quota

Object = dict[str, Any]
MULTIKUEUE = "kueue.x-k8s.io/multikueue"
ONE_CPU = {"image": "nothing:1", "resources": {"requests": {"cpu": 1}}}


def queue_of(namespace: str, worker: Path | None) -> list[Object]:
    """A queue of the namespace whose jobs go to a cluster. Without ``worker`` nobody says how that is reached."""
    name = f"quota-{namespace}"
    kind = {"apiVersion": API, "metadata": {"name": name}}
    parameters = {"apiGroup": API.partition("/")[0], "kind": "MultiKueueConfig", "name": name}
    objects = quota(namespace, "1")
    for one in objects:
        if one["kind"] == "ClusterQueue":
            one["spec"]["admissionChecksStrategy"] = {"admissionChecks": [{"name": name}]}
    secret = {
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": "kueue-system"},
        "stringData": {"kubeconfig": worker.read_text() if worker else ""},
    }  # fmt: skip
    return [
        *([secret] if worker else []),
        {**kind, "kind": "MultiKueueCluster",
         "spec": {"clusterSource": {"kubeConfig": {"location": name, "locationType": "Secret"}}}},
        {**kind, "kind": "MultiKueueConfig", "spec": {"clusters": [name]}},
        {**kind, "kind": "AdmissionCheck", "spec": {"controllerName": MULTIKUEUE, "parameters": parameters}},
        *objects,
    ]  # fmt: skip


def managed_by(driver: Driver, job: str) -> str:
    spec = driver.until_job(job)["spec"]
    return str(spec.get("runPolicy", spec).get("managedBy"))


def pods(driver: Driver) -> list[Object]:
    return driver.cluster.items("pods", "-n", driver.namespace)


@both
def test_a_job_for_another_cluster_is_left_to_kueue(driver: Driver):
    """Here nobody starts it, and it is not slow to start, as long as the other cluster cannot be reached."""
    driver.cluster.apply(queue_of(driver.namespace, None))
    at_once = {"startupTimeoutSeconds": 1, "retries": {"startupTimeout": 0}}
    driver.apply(manifest("run", sft(), queueName="alignment", template=ONE_CPU, failurePolicy=at_once))
    assert managed_by(driver, "run-sft-1") == MULTIKUEUE
    told = driver.until_condition("run", "Admitted", "False", timeout=60)
    assert told["message"]
    assert (driver.condition("run", "Failed")["status"], pods(driver)) == ("False", [])
    driver.patch("run", {"suspend": True})
    driver.until_condition("run", "Suspended")
    driver.cluster.wait(lambda: driver.jobs() == [], 30, "it can be ended as any")


@contextmanager
def worker_for(driver: Driver) -> Iterator[Driver]:
    """Another cluster, with the namespace and a queue of it, that the driver's sends its jobs to."""
    running = launch.start("api", 0)
    try:
        kubeconfig = Path(running.info["kubeconfig"])
        cluster = Cluster("api", kubeconfig, driver.cluster.kubectl_binary, running.state)
        cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": driver.namespace}})
        cluster.apply(quota(driver.namespace, "1"))
        driver.cluster.apply(queue_of(driver.namespace, kubeconfig))
        check = ("admissioncheck", f"quota-{driver.namespace}", "", "Active")
        driver.cluster.wait(lambda: driver.cluster.condition(*check), 60, "the other cluster is reached")
        yield Driver(cluster, driver.namespace, driver.backend)
    finally:
        running.stop()


def container_of(job: Object) -> Object:
    """What trains."""
    found = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    return {name: found[name] for name in ("command", "env", "image", "volumeMounts")}


@pytest.mark.soak
class TestTwoClusters:
    def test_phases_follow_one_another_in_another_cluster(self, driver: Driver):
        with worker_for(driver) as worker:
            driver.apply(manifest("run", sft(), dpo(), queueName="alignment", template=ONE_CPU))
            there = worker.until_job("run-sft-1", 60)
            here = driver.until_job("run-sft-1")
            assert container_of(there) == container_of(here)
            worker.start("run-sft-1")
            driver.until_condition("run", "Admitted", timeout=60)
            driver.until_phase("run", "sft", "Running")
            worker.succeed("run-sft-1")
            driver.until_phase("run", "sft", "Succeeded", 60)
            worker.until_job("run-dpo-1", 60)
            worker.fail("run-dpo-1", "Infrastructure")
            worker.until_job("run-dpo-2", 60)
            [failed, _] = driver.phase("run", "dpo")["attempts"]
            assert "failed in another cluster (MultiKueue)" in failed["message"]
            worker.succeed("run-dpo-2")
            driver.until_condition("run", "Succeeded", timeout=60)
            assert pods(driver) == []
            assert [len(phase["attempts"]) for phase in driver.status("run")["phases"]] == [1, 2]

    def test_what_is_suspended_ends_in_another_cluster(self, driver: Driver):
        with worker_for(driver) as worker:
            driver.apply(manifest("run", sft(), queueName="alignment", template=ONE_CPU))
            worker.until_job("run-sft-1", 60)
            driver.patch("run", {"suspend": True})
            driver.until_condition("run", "Suspended")
            worker.cluster.wait(lambda: worker.jobs() == [], 60, "Kueue has deleted it there")

    def test_trainjobs_wait_for_a_runtime_that_nobody_brings_there(self, driver: Driver):
        """Kueue copies the TrainJob, and not what it refers to."""
        driver.backend = "TrainJob"
        with worker_for(driver) as worker:
            driver.apply(manifest("run", sft(), queueName="alignment", template=ONE_CPU))
            told = driver.until_condition("run", "Admitted", "False", timeout=60, reason="QuotaReserved")
            assert "runs with backend PyTorchJob need none" in told["message"]
            assert worker.jobs() == []
