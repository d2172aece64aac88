"""What a user sees of a run's life on a cluster: phases, retries, suspensions, starts. The kubelet alone is played."""

import json

import pytest
from cluster.jobs import KINDS
from driver import FAST, SOAK, Driver, both, both_in_soak, dpo, manifest, sft


@both
def test_phases_run_in_order_to_success(driver: Driver):
    driver.apply(manifest("run", sft(), dpo()))
    driver.start("run-sft-1")
    driver.until_phase("run", "sft", "Running")
    assert driver.job_names() == ["run-sft-1"]
    driver.succeed("run-sft-1", metrics={"loss": 1.25})
    driver.succeed("run-dpo-1")
    driver.cluster.kubectl("wait", "--for=condition=Succeeded", "arun/run", "-n", driver.namespace, "--timeout=30s")
    status = driver.status("run")
    assert (status["phase"], status["progress"], status["percent"]) == ("Succeeded", "2/2 (100%)", 100)
    assert driver.phase("run", "sft")["metrics"] == {"loss": 1.25}
    file = json.loads(driver.template("run-dpo-1")["metadata"]["annotations"]["alignment.dev/phase-file"])
    folder = f"{driver.namespace}.run"
    assert status["folder"] == folder
    assert file["inputs"]["sft"] == {"path": f"/workspace/{folder}/sft", "digest": "artifact-of-run-sft-1"}


def test_independent_phases_run_side_by_side(driver: Driver):
    driver.apply(manifest("run", sft(), dpo("a"), dpo("b", beta=0.2)))
    driver.succeed("run-sft-1")
    driver.until_job("run-a-1")
    driver.until_job("run-b-1")
    driver.fail("run-a-1", "BadInput", "no such column")
    driver.until_phase("run", "a", "Failed")
    # What does not need the failed phase goes on.
    assert driver.condition("run", "Failed")["status"] == "False"
    driver.succeed("run-b-1")
    failed = driver.until_condition("run", "Failed")
    assert failed["message"] == "phase a: BadInput: no such column"


RETRIED = {
    "OutOfMemory": ({"outOfMemory": 1}, "OOMKilled: the pod needs more memory than what its node has"),
    "Infrastructure": ({"infrastructure": 1}, "ConnectionError: hub"),
    "Interrupted": ({"interrupted": 1}, "stopped after step 3 of 9; the checkpoint is saved"),
    "Internal": ({"internal": 1}, "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize(
    ("driver", "failure"),
    [
        (kind, failure)
        for kind in KINDS
        for failure in RETRIED
        if SOAK or kind == "PyTorchJob" or failure == "OutOfMemory"
    ],
    indirect=["driver"],
)
def test_a_failure_is_tried_again_within_its_classes_budget(driver: Driver, failure: str):
    budget, message = RETRIED[failure]
    none = dict.fromkeys(("outOfMemory", "infrastructure", "interrupted", "internal"), 0)
    driver.apply(manifest("run", sft(), failurePolicy={**FAST, "retries": none | budget}))
    for attempt in (1, 2):
        if failure == "OutOfMemory":
            driver.end(f"run-sft-{attempt}", 137, "", reason="OOMKilled")
        else:
            driver.fail(f"run-sft-{attempt}", failure, message)
    phase = driver.until_phase("run", "sft", "Failed")
    assert (phase["failure"], phase["message"]) == (failure, message)
    assert [a["state"] for a in phase["attempts"]] == ["Failed", "Failed"]
    # The job of the first attempt stays, to be looked at.
    assert driver.job_names() == ["run-sft-1", "run-sft-2"]
    assert len(driver.events("AttemptFailed")) == 1
    assert len(driver.events("PhaseFailed")) == 1


@both_in_soak
@pytest.mark.parametrize("failure", ["BadInput", "GateFailed", "Diverged"])
def test_what_another_attempt_cannot_mend_is_not_tried_again(driver: Driver, failure: str):
    driver.apply(manifest("run", sft(), dpo()))
    driver.fail("run-sft-1", failure, "gate missed: accuracy is 0.4, must be at least 0.5")
    failed = driver.until_condition("run", "Failed")
    assert failed["reason"] == "PhaseFailed"
    assert "accuracy is 0.4, must be at least 0.5" in failed["message"]
    assert driver.phase("run", "dpo")["state"] == "Blocked"
    assert driver.job_names() == ["run-sft-1"]


def test_raising_the_budget_lets_a_failed_run_go_on(driver: Driver):
    driver.apply(manifest("run", sft()))
    driver.fail("run-sft-1", "Internal", "RuntimeError: CUDA error: unspecified launch failure")
    driver.until_condition("run", "Failed")
    driver.patch("run", {"failurePolicy": {"retries": {"internal": 1}}})
    driver.succeed("run-sft-2")
    driver.until_condition("run", "Succeeded")


def annotated(driver: Driver, text: str) -> None:
    name = f"alignment.dev/retry={text}"
    driver.cluster.kubectl("annotate", "--overwrite", "arun/run", name, "-n", driver.namespace)


def test_a_failed_run_tries_again_without_an_edit(driver: Driver):
    driver.apply(manifest("run", sft(), dpo()))
    driver.fail("run-sft-1", "BadInput", "no such file")
    driver.until_condition("run", "Failed")
    generation = driver.run("run")["metadata"]["generation"]
    annotated(driver, "5")
    driver.fail("run-sft-2", "BadInput", "no such file")
    driver.until_condition("run", "Failed")
    # One that was obeyed, or is older, comes back: by a tool that keeps manifests, say.
    annotated(driver, "4 sft")
    annotated(driver, "5")
    annotated(driver, "nonsense")
    driver.cluster.wait(lambda: "refused" in driver.status("run").get("retry", {}), 30, "the nonsense is told")
    assert len(driver.events("RetryRefused")) == 1
    assert driver.job_names() == ["run-sft-1", "run-sft-2"]
    annotated(driver, "6")
    driver.succeed("run-sft-3")
    driver.succeed("run-dpo-1")
    driver.until_condition("run", "Succeeded")
    assert driver.run("run")["metadata"]["generation"] == generation
    assert driver.status("run")["retry"] == {"number": 6}


@both_in_soak
def test_what_has_finished_runs_anew_when_asked_to(driver: Driver):
    driver.apply(manifest("run", sft(), dpo("a"), dpo("b", beta=0.2)))
    for job in ("run-sft-1", "run-a-1", "run-b-1"):
        driver.succeed(job)
    driver.until_condition("run", "Succeeded")
    before = driver.phase("run", "a")["digest"]
    annotated(driver, "1 a")
    driver.start("run-a-2")
    driver.until_phase("run", "a", "Running")
    assert driver.condition("run", "Succeeded")["status"] == "False"
    driver.succeed("run-a-2")
    driver.until_condition("run", "Succeeded")
    assert driver.phase("run", "a")["digest"] != before
    assert driver.job_names() == ["run-a-1", "run-a-2", "run-b-1", "run-sft-1"]
    assert [e["message"] for e in driver.events("PhaseChanged")] == ["phase a: it was asked to, so it runs again"]


@both
def test_a_job_that_someone_deletes_is_a_failure_and_the_next_attempt_follows(driver: Driver):
    driver.apply(manifest("run", sft()))
    driver.start("run-sft-1")
    driver.until_phase("run", "sft", "Running")
    pod = driver.until_pod_of("run-sft-1")["metadata"]["name"]
    driver.delete_job("run-sft-1")
    driver.cluster.kubectl("delete", "pod", pod, "-n", driver.namespace, "--force", "--ignore-not-found")
    driver.succeed("run-sft-2")
    driver.until_condition("run", "Succeeded")
    [event] = driver.events("AttemptFailed")
    said = "phase sft, attempt 1 failed: Interrupted: its job was deleted, and not by the operator"
    assert event["message"] == said
    assert driver.job_names() == ["run-sft-2"]


@both
class TestSuspension:
    def test_of_a_run(self, driver: Driver):
        driver.apply(manifest("run", sft(), dpo(), suspend=True))
        driver.until_condition("run", "Suspended")
        assert driver.jobs() == []
        driver.patch("run", {"suspend": False})
        driver.start("run-sft-1")
        driver.until_phase("run", "sft", "Running")
        driver.patch("run", {"suspend": True})
        driver.cluster.wait(lambda: not driver.jobs(), 30, "no job is left")
        driver.until_phase("run", "sft", "Suspended")
        driver.patch("run", {"suspend": False})
        # A new attempt, which goes on from what the stopped one has saved; it is no failure.
        driver.succeed("run-sft-2")
        driver.until_job("run-dpo-1")
        assert [a["state"] for a in driver.phase("run", "sft")["attempts"]] == ["Stopped", "Succeeded"]

    def test_of_one_phase(self, driver: Driver):
        driver.apply(manifest("run", sft(), {**dpo("a"), "suspend": True}, dpo("b", beta=0.2)))
        driver.succeed("run-sft-1")
        driver.succeed("run-b-1")
        suspended = driver.until_condition("run", "Suspended")
        assert suspended["message"] == "suspended: a"
        driver.edit_phase("run", {**dpo("a"), "suspend": False})
        driver.succeed("run-a-1")
        driver.until_condition("run", "Succeeded")


@both
def test_a_job_that_somebody_suspends_is_one_that_does_not_begin(driver: Driver):
    """It held up its run for ever, without a word."""
    driver.apply(manifest("run", sft(), failurePolicy={**FAST, "startupTimeoutSeconds": 15}))
    driver.start("run-sft-1")
    driver.until_phase("run", "sft", "Running")
    suspended = {"runPolicy": {"suspend": True}} if driver.backend == "PyTorchJob" else {"suspend": True}
    held = ("patch", driver.kind.plural, "run-sft-1", "-n", driver.namespace, "--type=merge")
    driver.cluster.kubectl(*held, "-p", json.dumps({"spec": suspended}))
    driver.start("run-sft-2")
    [attempt, _] = driver.phase("run", "sft")["attempts"]
    assert (attempt["state"], attempt["failure"]) == ("Failed", "StartupTimeout")
    assert attempt["message"].startswith(
        "not running after 15 s: its job is suspended, and not by a queue; it goes on when spec."
    )


@both
class TestStart:
    def test_pods_that_never_run_are_given_up(self, driver: Driver):
        policy = {**FAST, "startupTimeoutSeconds": 3, "retries": {"startupTimeout": 1}}
        driver.apply(manifest("run", sft(), failurePolicy=policy))
        wait = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "nothing:1"'}
        driver.write("run-sft-1", 0, "Pending", {"waiting": wait})
        phase = driver.until_phase("run", "sft", "Failed")
        assert phase["failure"] == "StartupTimeout"
        assert [a["failure"] for a in phase["attempts"]] == ["StartupTimeout", "StartupTimeout"]
        assert phase["attempts"][0]["message"].startswith("not running after 3 s: ImagePullBackOff nothing:1: Back-off")

    def test_what_a_pod_waits_for_is_told_meanwhile(self, driver: Driver):
        driver.apply(manifest("run", sft()))
        pod = driver.until_pod_of("run-sft-1")["metadata"]["name"]
        status = {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                                  "message": 'persistentvolumeclaim "work" not found'}]}  # fmt: skip
        driver.cluster.patch_status("pod", pod, driver.namespace, status)
        told = 'Unschedulable: persistentvolumeclaim "work" not found'
        driver.cluster.wait(lambda: driver.phase("run", "sft").get("message") == told, 30, told)

    def test_a_full_quota_is_waited_for(self, driver: Driver):
        """It ended runs once, after 380 seconds."""
        driver.no_more_jobs()
        driver.apply(manifest("run", sft(), failurePolicy={**FAST, "retries": {"infrastructure": 0}}))
        driver.until_condition("run", "Progressing", reason="JobForbidden", message="exceeded quota: none")
        assert len(driver.events("JobForbidden")) == 1
        driver.cluster.kubectl("delete", "resourcequota", "none", "-n", driver.namespace)
        driver.until_job("run-sft-1")
        assert len(driver.phase("run", "sft")["attempts"]) == 1

    def test_pods_that_may_not_be_made(self, driver: Driver):
        quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "no-pods"},
                 "spec": {"hard": {"pods": "0"}}}  # fmt: skip
        driver.cluster.apply(quota, driver.namespace)
        driver.cluster.wait(
            lambda: driver.cluster.get("resourcequota", "no-pods", "-n", driver.namespace).get("status", {}).get("hard"),
            30, "the quota holds",
        )  # fmt: skip
        driver.apply(manifest("run", sft()))
        driver.cluster.wait(
            lambda: "exceeded quota: no-pods" in driver.phase("run", "sft").get("message", ""), 60, "the quota is named"
        )
