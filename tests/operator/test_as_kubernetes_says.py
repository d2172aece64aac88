"""What is said of pods and policies before they are made is what the real API server says: each is shown to it, and not kept."""

from collections.abc import Iterator
from typing import Any

import pytest
from cluster.client import Cluster, KubectlError
from cluster.kube_http import Server
from driver import manifest, sft
from peer_cases import BAD, GOOD
from pod_templates import REFUSED, TAKEN

from controller.api.run import AlignmentRun
from controller.backends.cluster import network, pytorchjob
from controller.backends.cluster.kind import Owner
from controller.backends.cluster.settings import Settings
from controller.plan.foreign import handed_on
from controller.plan.job import build_job
from controller.plan.resolve import resolve

Object = dict[str, Any]
GROUPS = {"pods": "/api/v1", "networkpolicies": "/apis/networking.k8s.io/v1", "jobs": "/apis/batch/v1"}


@pytest.fixture(scope="module")
def shown(prepared: Cluster) -> Iterator[Any]:
    """Tells what the API server answers: nothing if it takes it."""
    server, namespace = Server(prepared), prepared.namespace("shown")

    def ask(path: str, document: Object) -> str:
        try:
            server.create(f"{GROUPS[path]}/namespaces/{namespace}/{path}?dryRun=All", document)
        except KubectlError as error:
            return str(error)
        return ""

    return ask


def run_of(template: Object) -> AlignmentRun:
    document = manifest("run", sft(), template={"image": "nothing:1", **template})
    document["metadata"] |= {"uid": "uid-of-it"}
    return AlignmentRun.model_validate(document)


def pod_of(template: Object) -> Object:
    run = run_of(template)
    [phase] = resolve(run)
    job = build_job(run, phase, 1, "digest", {}, (), alone=True)
    rendered = pytorchjob.render(job, Owner("default", "run", "uid-of-it", "run"), Settings(user=1000))
    found = rendered["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **found["metadata"]}, "spec": found["spec"]}


def test_pods_that_are_refused_beforehand_are_those_that_it_refuses(shown: Any):
    answers = {case: shown("pods", pod_of(template)) for case, (template, _) in REFUSED.items()}
    assert [case for case, answer in answers.items() if "422" not in answer] == []


def test_pods_that_are_taken_are_those_that_it_takes(shown: Any):
    answers = {case: shown("pods", pod_of(template)) for case, template in TAKEN.items()}
    assert {case: answer for case, answer in answers.items() if answer} == {}


@pytest.mark.parametrize(
    "label", ["job-name", "controller-uid", "batch.kubernetes.io/job-name", "batch.kubernetes.io/controller-uid"]
)
def test_no_job_is_made_whose_pods_bear_the_labels_of_another(shown: Any, label: str):
    """As of a TrainJob; those that make a run's jobs keep them from a run and from its template."""
    pod = pod_of({})
    pod["spec"]["restartPolicy"] = "Never"

    def answer(**labels: str) -> str:
        metadata = {**pod["metadata"], "labels": {**pod["metadata"]["labels"], **labels}}
        spec = {"template": {"metadata": metadata, "spec": pod["spec"]}}
        return str(shown("jobs", {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": spec}))

    assert answer() == ""
    assert "422" in answer(**{label: "x"})
    assert handed_on({label: "x", "team": "a"}) == {"team": "a"}


def test_so_are_peers_of_a_policy(shown: Any):
    def answer(peer: Object) -> str:
        policy = network.policy(run_of({}), [peer])
        return str(shown("networkpolicies", {**policy, "metadata": {"name": "policy"}}))

    assert {case: said for case, peer in GOOD.items() if (said := answer(peer))} == {}
    # What it does not know it leaves out, and lets everybody in.
    unknown = {case for case, (_, said) in BAD.items() if "no such field" in said}
    assert [case for case, (peer, _) in BAD.items() if case not in unknown and not answer(peer)] == []
