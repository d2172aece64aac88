"""A cluster whose own admission refuses our jobs, or cannot be asked: the run says so with its words, and goes on when it may."""

from pathlib import Path

import pytest
from driver import Driver, manifest, sft
from refusing import WORDS, refused_jobs


@pytest.mark.parametrize("answers", [True, False], ids=["it says no", "it is down"])
def test_a_webhook_refuses_our_jobs(driver: Driver, tmp_path: Path, answers: bool):
    with refused_jobs(driver.cluster, driver.namespace, tmp_path, answers):
        driver.apply(manifest("run", sft()))
        if answers:
            driver.until_condition("run", "Progressing", reason="JobForbidden", message=WORDS)
        else:
            driver.cluster.wait(lambda: _asked(driver) >= 2, 60, "it is tried again")
        assert driver.condition("run", "Failed").get("status") != "True" and not driver.jobs()
    driver.succeed("run-sft-1")
    done = driver.until_condition("run", "Succeeded", timeout=60)
    assert done["status"] == "True" and driver.job_names() == ["run-sft-1"]


def _asked(driver: Driver) -> int:
    """How often a job of this namespace was to be made."""
    path = f"/namespaces/{driver.namespace}/pytorchjobs"
    return sum(path in event["requestURI"] for event in driver.cluster.audited("alignment-operator", ["create"]))
