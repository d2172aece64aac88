"""The NetworkPolicy of a run: its own, as long as it, and never somebody else's. What enforces it is the cluster's network."""

import json
from typing import Any

from cluster.client import KubectlError
from driver import Driver, both, manifest, sft

Object = dict[str, Any]
OWN = {"matchLabels": {"app.kubernetes.io/managed-by": "alignment-operator", "alignment.dev/run": "run"}}
METRICS = {"ports": [{"protocol": "TCP", "port": 9400, "endPort": 9463}]}


def policies(driver: Driver) -> list[Object]:
    return driver.cluster.items("networkpolicies", "-n", driver.namespace)


def edit(driver: Driver, name: str, spec: Object) -> None:
    patch = json.dumps({"spec": spec})
    driver.cluster.kubectl("patch", "networkpolicy", name, "-n", driver.namespace, "--type=merge", "-p", patch)


@both
def test_a_runs_pods_are_open_to_each_other_and_for_metrics(driver: Driver):
    driver.apply(manifest("run", sft()))
    driver.until_job("run-sft-1")
    [policy] = policies(driver)
    assert policy["metadata"]["ownerReferences"][0]["uid"] == driver.run("run")["metadata"]["uid"]
    assert policy["spec"] == {
        "podSelector": OWN,
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": OWN}]}, METRICS],
    }
    labels = driver.until_pod_of("run-sft-1")["metadata"]["labels"]
    assert OWN["matchLabels"].items() <= labels.items()
    edit(driver, policy["metadata"]["name"], {"ingress": []})
    driver.start("run-sft-1")
    driver.fail("run-sft-1", "Infrastructure")
    driver.until_job("run-sft-2")
    [again] = policies(driver)
    assert again["spec"] == policy["spec"], "somebody's edit holds until the next attempt"
    driver.cluster.kubectl("delete", "arun", "run", "-n", driver.namespace)
    driver.cluster.wait(lambda: policies(driver) == [], 60, "it is gone with its run")


def test_a_strangers_policy_is_left_alone(driver: Driver):
    driver.apply(manifest("run", sft(), suspend=True))
    driver.until_condition("run", "Suspended")
    name = f"run-{driver.run('run')['metadata']['uid'][:8]}"
    theirs = {"podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Ingress"]}
    stranger = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": theirs,
    }
    driver.cluster.apply(stranger, driver.namespace)
    driver.patch("run", {"suspend": False})
    said = driver.until_condition("run", "Progressing", reason="JobForbidden")
    assert f"is taken by NetworkPolicy {name} of nobody, which is left alone" in said["message"]
    [policy] = policies(driver)
    assert policy["spec"] == theirs
    driver.cluster.kubectl("delete", "networkpolicy", name, "-n", driver.namespace)
    driver.until_job("run-sft-1", timeout=60)
    try:
        driver.cluster.get("networkpolicy", name, "-n", driver.namespace)
    except KubectlError:
        raise AssertionError("the job was made without its policy") from None
