"""A cluster whose own admission refuses our jobs, or cannot be asked: the run says so with its words, and goes on when it may."""

from pathlib import Path

from cluster.client import KubectlError
from driver import Driver, manifest, sft
from refusing import CODES, POLICY, WORDS, policy, refused_jobs


def test_our_jobs_are_refused(driver: Driver, tmp_path: Path):
    """By a webhook, with any code, and by a policy: side by side. None of it is an end."""
    runs = [POLICY, *(f"refused{code}" for code in CODES)]
    with (
        refused_jobs(driver.cluster, driver.namespace, tmp_path, answers=True),
        policy(driver.cluster, driver.namespace),
    ):
        driver.cluster.wait(lambda: _refuses(driver), 30, "the policy holds")
        for run in runs:
            driver.apply(manifest(run, sft()))
        for run in runs:
            driver.until_condition(run, "Progressing", reason="JobForbidden", message=WORDS, timeout=60)
        assert not any(driver.condition(run, "Failed").get("status") == "True" for run in runs) and not driver.jobs()
    for run in runs:
        driver.until_job(f"{run}-sft-1", timeout=60)
    driver.succeed("refused409-sft-1")
    driver.until_condition("refused409", "Succeeded", timeout=60)
    assert driver.job_names() == sorted(f"{run}-sft-1" for run in runs)


def test_a_webhook_is_down(driver: Driver, tmp_path: Path):
    with refused_jobs(driver.cluster, driver.namespace, tmp_path, answers=False):
        driver.apply(manifest("run", sft()))
        said = "failed calling webhook"
        driver.until_condition("run", "Progressing", reason="JobForbidden", message=said, timeout=60)
        driver.cluster.wait(lambda: _asked(driver) >= 2, 60, "it is tried again")
        assert driver.condition("run", "Failed").get("status") != "True" and not driver.jobs()
    driver.succeed("run-sft-1")
    done = driver.until_condition("run", "Succeeded", timeout=60)
    assert done["status"] == "True" and driver.job_names() == ["run-sft-1"]


def _refuses(driver: Driver) -> bool:
    """A policy holds a moment after it is applied."""
    pods = {"spec": {"containers": [{"name": driver.kind.container, "image": "nothing:1"}]}}
    spec = {"pytorchReplicaSpecs": {"Worker": {"replicas": 1, "template": pods}}}
    job = {"apiVersion": driver.kind.api, "kind": driver.backend, "metadata": {"name": POLICY}, "spec": spec}
    try:
        driver.server.create(f"{driver.kind.path(driver.namespace)}?dryRun=All", job)
    except KubectlError as error:
        return WORDS in str(error)
    return False


def _asked(driver: Driver) -> int:
    """How often a job of this namespace was to be made."""
    path = f"/namespaces/{driver.namespace}/pytorchjobs"
    return sum(path in event["requestURI"] for event in driver.cluster.audited("alignment-operator", ["create"]))
