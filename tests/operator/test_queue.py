"""Runs that wait in a real Kueue; the kubelet alone is played."""

import time

from driver import Driver, both, manifest, sft
from kueue import quota

ONE_CPU = {"image": "nothing:1", "resources": {"requests": {"cpu": 1}}}


def queued(name: str, priority: str | None = None, **spec):
    more = {"queuePriority": priority} if priority else {}
    return manifest(name, sft(), queueName="alignment", template=ONE_CPU, **more, **spec)


def suspended(driver: Driver, job: str) -> bool:
    spec = driver.until_job(job)["spec"]
    return bool(spec.get("runPolicy", spec).get("suspend"))


@both
class TestQuota:
    def test_two_runs_compete_for_room_for_one(self, driver: Driver):
        driver.cluster.apply(quota(driver.namespace, "1"))
        driver.apply(queued("first"))
        driver.until_condition("first", "Admitted")
        driver.apply(queued("second"))
        # Kueue says why a moment after it has said that.
        why = "insufficient unused quota for cpu"
        driver.until_condition("second", "Admitted", "False", reason="Pending", message=why)
        assert driver.status("second")["phase"] == "Queued"
        assert driver.phase("second", "sft")["queue"]["state"] == "Pending"
        columns = driver.cluster.kubectl("get", "arun", "-n", driver.namespace)
        assert "Queued" in columns
        driver.succeed("first-sft-1")
        driver.until_condition("first", "Succeeded")
        driver.until_condition("second", "Admitted", timeout=40)
        driver.succeed("second-sft-1")
        driver.until_condition("second", "Succeeded")

    def test_a_priority_that_does_not_exist_is_said(self, driver: Driver):
        """Kueue leaves the job suspended and makes no Workload: as if its integration were off, but then it would run."""
        driver.cluster.apply(quota(driver.namespace, "1"))
        name = f"nobody-made-it-{driver.namespace}"
        driver.apply(queued("run", name))
        told = driver.until_condition("run", "Admitted", "False", reason="Missing", timeout=60)
        assert f"WorkloadPriorityClass {name} does not exist" in told["message"]
        priority = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "WorkloadPriorityClass", "value": 1}
        driver.cluster.apply({**priority, "metadata": {"name": name}})
        driver.until_condition("run", "Admitted", timeout=120)

    def test_waiting_in_a_queue_is_not_a_slow_start(self, driver: Driver):
        driver.cluster.apply(quota(driver.namespace, "0"))
        driver.apply(queued("run", failurePolicy={"startupTimeoutSeconds": 2, "retries": {"startupTimeout": 0}}))
        driver.until_condition("run", "Admitted", "False")
        time.sleep(4)
        assert driver.condition("run", "Failed")["status"] == "False"

    def test_a_run_of_higher_priority_preempts_one_which_goes_on_afterwards(self, driver: Driver):
        driver.cluster.apply(quota(driver.namespace, "1"))
        driver.apply(queued("low", "alignment-low"))
        driver.start("low-sft-1")
        driver.until_phase("low", "sft", "Running")
        uid, pod = (
            driver.until_job("low-sft-1")["metadata"]["uid"],
            driver.until_pod_of("low-sft-1")["metadata"]["name"],
        )
        driver.apply(queued("high", "alignment-high"))
        told = driver.until_condition("low", "Admitted", "False", reason="Preempted", timeout=40)
        assert "Preempted to accommodate a workload" in told["message"]
        # The kubelet, which is not there, would end the pod.
        driver.cluster.kubectl("delete", "pod", pod, "-n", driver.namespace, "--force", "--grace-period=0", check=False)
        driver.until_condition("high", "Admitted", timeout=40)
        assert suspended(driver, "low-sft-1")
        driver.succeed("high-sft-1")
        driver.until_condition("high", "Succeeded")
        driver.until_condition("low", "Admitted", timeout=60)
        driver.succeed("low-sft-1")
        driver.until_condition("low", "Succeeded")
        # The same job, the same attempt: a preemption is no failure.
        assert driver.until_job("low-sft-1")["metadata"]["uid"] == uid
        assert [a["number"] for a in driver.phase("low", "sft")["attempts"]] == [1]
        assert driver.events("QueuePreempted")

    def test_suspending_a_queued_run_gives_its_quota_back(self, driver: Driver):
        driver.cluster.apply(quota(driver.namespace, "1"))
        driver.apply(queued("first"))
        driver.until_condition("first", "Admitted")
        driver.apply(queued("second"))
        driver.until_condition("second", "Admitted", "False")
        driver.until_condition(
            "second", "Progressing", reason="Queued", message="waiting for a queue: sft: ", timeout=60
        )
        driver.patch("first", {"suspend": True})
        driver.until_condition("second", "Admitted", timeout=40)
        driver.until_condition("first", "Suspended")


class TestMissing:
    def test_a_queue_that_does_not_exist(self, driver: Driver):
        driver.apply(manifest("run", sft(), queueName="nowhere"))
        told = driver.until_condition("run", "Admitted", "False", reason="Missing", timeout=40)
        assert "nowhere" in told["message"]
        assert suspended(driver, "run-sft-1")
        driver.patch("run", {"queueName": None})
        assert not suspended(driver, "run-sft-2"), "it waits in no queue any more"
        assert "kueue.x-k8s.io/queue-name" not in driver.until_job("run-sft-2")["metadata"]["labels"]
