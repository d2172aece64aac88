"""What an admin allows runs of a namespace, as the chart renders it: refused when it is applied, and when a job is made."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chart.helm import template
from cluster.client import Cluster
from driver import Driver, OperatorProcess, both, dpo, manifest, sft

Object = dict[str, Any]
KINDS = ("ValidatingAdmissionPolicyBinding", "ValidatingAdmissionPolicy")
LIMITS: Object = {
    "images": ["registry.example.com/team-a/*", "trainer:1"],
    "serviceAccounts": ["trainer"],
    "claims": ["data"],
    "secrets": ["hub"],
    "queues": ["team-a"],
    "nodeSelector": {"example.com/pool": ["a", "b"]},
    "maxNodes": 4,
}
GOOD: Object = {"image": "trainer:1", "nodeSelector": {"example.com/pool": "a"}}

REFUSED = {
    "image": ({"image": "evil:1"}, 'image: "evil:1" is not allowed in this namespace; allowed: registry.example.com/team-a/*'),
    "image that begins alike": ({"image": "trainer:11"}, 'image: "trainer:11" is not allowed'),
    "image of a server": ({"server": {"image": "evil:3"}}, 'image: "evil:3"'),
    "image of a server that is not named": ({"server": {}}, 'image: "vllm/vllm-openai:'),
    "image as a volume": ({"volumes": [{"mountPath": "/m", "image": {"reference": "evil:2"}}]}, 'image: "evil:2"'),
    "service account": ({"serviceAccountName": "admin"}, 'serviceAccountName: "admin" is not allowed'),
    "claim": ({"claims": [{"claimName": "secrets", "mountPath": "/s"}]}, 'claimName: "secrets" is not allowed'),
    "secret": ({"secretRefs": ["hub", "root"]}, 'secretRefs: "root" is not allowed in this namespace; allowed: hub'),
    "pull secret": ({"imagePullSecrets": ["root"]}, 'secretRefs: "root" is not allowed'),
    "node": ({"nodeSelector": {"example.com/pool": "c"}}, 'nodeSelector[example.com/pool]: "c" is not allowed'),
    "no node": ({"nodeSelector": {}}, 'nodeSelector[example.com/pool]: "" is not allowed'),
    "size": ({"nodes": 5}, 'nodes: "5" is not allowed in this namespace; at most: 4'),
}  # fmt: skip


@pytest.fixture
def limit(prepared: Cluster) -> Iterator[Callable[[str], None]]:
    """Puts a namespace under LIMITS; without a namespace, lifts them."""
    made: list[Object] = []
    limited: list[str] = []
    bad = {"spec": {"template": {**GOOD, "image": "evil:1"}}}

    def apply(namespace: str = "") -> None:
        if not namespace:
            names = [f"{thing['kind']}/{thing['metadata']['name']}" for thing in made]
            prepared.kubectl("delete", "--ignore-not-found", *names)
            # The API server goes on enforcing what it remembers for a moment.
            for one in limited:
                prepared.wait(lambda one=one: "denied" not in tried(prepared, one, bad), 60, "the limits are lifted")
            return
        values = {
            "defaults": {"workspaceClaim": "work"},
            "limits": [{"name": namespace, "namespaces": [namespace], **LIMITS}],
        }
        made.extend(thing for thing in template(values) if thing["kind"] in KINDS)
        assert len(made) == 4
        prepared.apply(made)
        limited.append(namespace)
        prepared.wait(lambda: "denied" in tried(prepared, namespace, bad), 60, "the limits hold")

    yield apply
    apply()


def run(template: Object, phase: Object | None = None, **spec: Any) -> Object:
    entry = {**sft(), **({"template": phase} if phase else {})}
    return manifest("run", entry, **{"template": template, "queueName": "team-a", **spec})


def tried(cluster: Cluster, namespace: str, document: Object) -> str:
    document = {**run(GOOD), **document, "spec": {**run(GOOD)["spec"], **document["spec"]}}
    return cluster.kubectl(
        "create", "--dry-run=server", "-n", namespace, "-f", "-", input=json.dumps(document), check=False
    )


def test_what_is_not_allowed_is_refused_by_name(driver: Driver, limit: Callable[[str], None]):
    limit(driver.namespace)
    assert "created" in tried(driver.cluster, driver.namespace, run(GOOD))
    for asked, message in REFUSED.values():
        for document in (run({**GOOD, **asked}), run(GOOD, asked)):
            assert message in tried(driver.cluster, driver.namespace, document), document["spec"]
    unqueued = run(GOOD, queueName=None)
    assert 'queueName: "" is not allowed' in tried(driver.cluster, driver.namespace, unqueued)
    elsewhere = run(GOOD, workspace={"claimName": "theirs"})
    assert 'claimName: "theirs" is not allowed' in tried(driver.cluster, driver.namespace, elsewhere)
    nothing = run({**GOOD, "serviceAccountName": None, "volumes": None, "nodes": None}, workspace=None)
    nothing["spec"]["phases"][0]["template"] = None
    assert "created" in tried(driver.cluster, driver.namespace, nothing), "a null asks for nothing"
    other = driver.cluster.namespace("free")
    assert "created" in tried(driver.cluster, other, run({"image": "evil:1"})), "it is about one namespace"


@both
def test_what_is_allowed_is_carried_out(driver: Driver, limit: Callable[[str], None]):
    limit(driver.namespace)
    everything = {"serviceAccountName": "trainer", "secretRefs": ["hub"], "nodes": 4}
    everything |= {"claims": [{"claimName": "data", "mountPath": "/data"}]}
    driver.apply(run({**GOOD, **everything}))
    driver.until_job("run-sft-1")


@both
def test_a_run_that_was_there_before_gets_no_further_job(driver: Driver, limit: Callable[[str], None]):
    driver.apply(run({"image": "evil:1"}))
    driver.until_job("run-sft-1")
    limit(driver.namespace)
    driver.delete_job("run-sft-1")
    said = driver.until_condition(
        "run", "Progressing", reason="JobForbidden", message='image: "evil:1" is not allowed', timeout=60
    )
    assert "allowed: registry.example.com/team-a/*, trainer:1" in said["message"]
    assert "denied" in driver.cluster.kubectl(
        "patch", "arun", "run", "-n", driver.namespace, "--type=merge", "-p", '{"spec": {"seed": 1}}', check=False
    )
    driver.patch("run", {"suspend": True})
    driver.until_condition("run", "Suspended")
    limit("")
    driver.patch("run", {"suspend": False})
    driver.cluster.wait(driver.job_names, 60, "it goes on")


def test_a_run_that_takes_too_much_at_once_goes_on_when_it_is_edited_or_the_limit_lifted(
    driver: Driver, operator: OperatorProcess, operator_factory: Callable[..., OperatorProcess]
):
    """The operator has the limit as an option, so whoever changes it starts it anew."""
    operator.stop()
    most = [{"namespaces": [driver.namespace], "most": {"nodes": 2}}]
    limited = operator_factory("--metrics-readers", "[]", "--largest-runs", json.dumps(most)).start()
    two = {"template": {"nodes": 2}}
    chain, side_by_side = (sft(), dpo() | two), (sft(), sft("other") | two)
    for name, phases in {"fits": chain, "edited": side_by_side, "waits": side_by_side}.items():
        driver.apply(manifest(name, *phases))
    why = (
        "spec.phases: sft, other may run at once, with 3 nodes in all; a run in this namespace takes at most 2 at once"
    )
    for name in ("edited", "waits"):
        driver.until_condition(name, "Accepted", "False", reason="InvalidSpec", message=why, timeout=60)
    driver.until_job("fits-sft-1")
    driver.edit_phase("edited", sft("other"))
    driver.until_condition("edited", "Accepted")
    driver.until_job("edited-other-1")
    assert driver.job_names() == ["edited-other-1", "edited-sft-1", "fits-sft-1"]
    keep = ("patch", driver.kind.plural, "fits-sft-1", "-n", driver.namespace, "--type=merge", "-p")
    driver.cluster.kubectl(*keep, json.dumps({"metadata": {"finalizers": ["example.com/slow"]}}))
    driver.patch("fits", {"phases": [sft("renamed") | two]})
    driver.until_phase("fits", "renamed", "Ready")
    said = driver.phase("fits", "renamed")["message"]
    assert said.startswith("waits: 1 nodes are still taken by attempts that have not ended"), said
    driver.cluster.kubectl(*keep, json.dumps({"metadata": {"finalizers": None}}))
    driver.until_job("fits-renamed-1")
    assert limited.stop() == 0
    operator.start()
    driver.until_condition("waits", "Accepted", timeout=60)
    driver.until_job("waits-other-1")
    assert "waits-sft-1" in driver.job_names()
