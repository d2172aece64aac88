"""Somebody edits or deletes what is a run's own, and knows no better: its status, a pod that trains."""

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
def test_a_pod_that_somebody_deletes_is_a_failure_and_the_next_attempt_follows(driver: Driver):
    driver.apply(manifest("run", sft()))
    driver.start("run-sft-1")
    driver.until_phase("run", "sft", "Running")
    pod = driver.until_pod_of("run-sft-1")["metadata"]["name"]
    # A beginning and an end within a tenth of a second are told as one: of a pod that was never seen to run nothing is lost.
    time.sleep(2)
    driver.cluster.kubectl("delete", "pod", pod, "-n", driver.namespace, "--force", "--grace-period=0")
    driver.until_job("run-sft-2")
    [attempt, _] = driver.phase("run", "sft")["attempts"]
    assert (attempt["state"], attempt["failure"]) == ("Failed", "Infrastructure")
    driver.succeed("run-sft-2")
    driver.until_condition("run", "Succeeded")
