"""Somebody edits or deletes what is a run's own, and knows no better: its status, a pod that trains, whose a job is."""

import json
import time
from typing import Any

import pytest
from driver import Driver, both, dpo, manifest, sft

WAITING = {"name": "sft", "type": "sft", "state": "Waiting", "attempts": []}
DONE = {"name": "dpo", "type": "dpo", "state": "Succeeded", "digest": "d", "artifactDigest": "a", "attempts": []}
EDITS: dict[str, Any] = {"emptied": {}, "of the past": {"phases": [WAITING]}, "made up": {"phases": [DONE]}}


@both
@pytest.mark.parametrize("edit", EDITS)
def test_a_status_that_somebody_edits_is_put_right(driver: Driver, edit: str):
    """What the cluster shows counts: no phase runs twice, none is left out."""
    driver.apply(manifest("run", sft(), dpo()))
    driver.succeed("run-sft-1")
    driver.start("run-dpo-1")
    driver.until_phase("run", "dpo", "Running")
    known = {name: driver.phase("run", name)["digest"] for name in ("sft", "dpo")}
    patch = json.dumps([{"op": "replace", "path": "/status", "value": EDITS[edit]}])
    edited = ("--subresource=status", "--type=json", "-p", patch)
    driver.cluster.kubectl("patch", "arun", "run", "-n", driver.namespace, *edited)
    driver.cluster.wait(lambda: {n: driver.phase("run", n).get("digest") for n in known} == known, 60, "put right")
    assert [driver.phase("run", name)["state"] for name in known] == ["Succeeded", "Running"]
    driver.succeed("run-dpo-1")
    driver.until_condition("run", "Succeeded")
    assert driver.job_names() == ["run-dpo-1", "run-sft-1"]


@both
def test_a_pod_that_somebody_deletes_is_made_up_for(driver: Driver):
    """The next attempt follows, or this one goes on.

    The API server deletes in two writes. If the Training Operator looks between them, it counts the pod as failed, and with it
    the job; if it looks behind them, a pod is missing, and is made anew.
    """
    driver.apply(manifest("run", sft()))
    driver.start("run-sft-1")
    driver.until_phase("run", "sft", "Running")
    pod = driver.until_pod_of("run-sft-1")["metadata"]
    # A beginning and an end within a tenth of a second are told as one: of a pod that was never seen to run nothing is lost.
    time.sleep(2)
    driver.cluster.kubectl("delete", "pod", pod["name"], "-n", driver.namespace, "--force", "--grace-period=0")

    def after() -> str:
        pods = driver.cluster.items("pods", "-n", driver.namespace)
        again = [p for p in pods if p["metadata"]["uid"] != pod["uid"]]
        return "run-sft-2" if "run-sft-2" in driver.job_names() else "run-sft-1" if again else ""

    goes_on = driver.cluster.wait(after, 60, "a job or a pod follows")
    if goes_on == "run-sft-2":
        [attempt, _] = driver.phase("run", "sft")["attempts"]
        assert (attempt["state"], attempt["failure"]) == ("Failed", "Infrastructure")
    else:
        driver.start(goes_on)
    driver.succeed(goes_on)
    driver.until_condition("run", "Succeeded")
    assert goes_on in driver.job_names() and len(driver.phase("run", "sft")["attempts"]) == int(goes_on[-1])


@both
def test_a_job_that_somebody_takes_the_owner_reference_from_stays_the_runs_and_gets_it_back(driver: Driver):
    driver.apply(manifest("run", sft()))
    driver.start("run-sft-1")
    driver.until_phase("run", "sft", "Running")
    made = driver.until_job("run-sft-1")["metadata"]
    patch = json.dumps([{"op": "remove", "path": "/metadata/ownerReferences"}])
    driver.cluster.kubectl("patch", driver.kind.plural, "run-sft-1", "-n", driver.namespace, "--type=json", "-p", patch)
    [told] = driver.events("OwnerLost")
    assert "somebody took the owner reference away from job run-sft-1: it stays the run's" in told["message"]

    def put_back() -> bool:
        return driver.until_job("run-sft-1")["metadata"].get("ownerReferences") == made["ownerReferences"]

    driver.cluster.wait(put_back, 60, "the job says again whose it is")
    driver.succeed("run-sft-1")
    driver.until_condition("run", "Succeeded", timeout=60)
    [attempt] = driver.phase("run", "sft")["attempts"]
    assert (attempt["state"], attempt["jobUid"], driver.job_names()) == ("Succeeded", made["uid"], ["run-sft-1"])
    driver.cluster.kubectl("delete", "arun", "run", "-n", driver.namespace)
    driver.cluster.wait(lambda: not driver.job_names(), 60, "the job goes with its run")


def test_who_writes_a_status_has_the_operator_touch_no_job_that_it_did_not_make(driver: Driver):
    """A status that remembers a stranger's job as the attempt's own."""
    driver.apply(manifest("run", sft()))
    driver.start("run-sft-1")
    driver.until_phase("run", "sft", "Running")
    stranger = driver.until_job("run-sft-1")
    spec = {**stranger, "metadata": {"name": "web", "labels": stranger["metadata"]["labels"]}}
    del spec["status"]
    driver.apply(spec)
    uid = driver.until_job("web")["metadata"]["uid"]
    claims = [{"op": "replace", "path": f"/status/phases/0/attempts/0/{key}", "value": value}
              for key, value in (("jobUid", uid), ("job", "web"))]  # fmt: skip
    edited = ("--subresource=status", "--type=json", "-p", json.dumps(claims))
    driver.cluster.kubectl("patch", "arun", "run", "-n", driver.namespace, *edited)
    driver.patch("run", {"suspend": True})
    driver.until_phase("run", "sft", "Suspended", timeout=60)
    driver.cluster.wait(lambda: "run-sft-1" not in driver.job_names(), 60, "its own job is stopped")
    found = driver.until_job("web")["metadata"]
    assert (found["uid"], found.get("ownerReferences"), found.get("deletionTimestamp")) == (uid, None, None)
