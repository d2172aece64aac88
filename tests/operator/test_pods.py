"""Pods as users want them: what the API server refuses, what arrives, and jobs that a sidecar outlives."""

import contextlib
import json
from typing import Any

import pytest
from cluster.client import Cluster, KubectlError
from driver import Driver, manifest, now, sft

Object = dict[str, Any]

EVERYTHING: Object = {
    "image": "nothing:1",
    "labels": {"team": "alignment"},
    "annotations": {"k8s.v1.cni.cncf.io/networks": "rdma-0"},
    "affinity": {
        "nodes": [{"key": "gpu", "values": ["H100"]}, {"key": "rack", "operator": "Exists", "weight": 10}],
        "pods": [{"topologyKey": "kubernetes.io/hostname", "apart": True}, {"topologyKey": "rack", "weight": 100}],
    },
    "topologySpreadConstraints": [{"topologyKey": "zone", "minDomains": 2}],
    "schedulerName": "volcano",
    "imagePullPolicy": "Always",
    "imagePullSecrets": ["registry"],
    "resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": "one-gpu"}],
    "securityContext": {"runAsUser": 4711, "runAsGroup": 0, "supplementalGroups": [100]},
    "volumes": [
        {"mountPath": "/tmp", "ephemeral": {"size": "500Gi", "storageClassName": "nvme"}},
        {"mountPath": "/cache", "csi": {"driver": "cache.example.com"}},
        {"mountPath": "/models", "image": {"reference": "registry/model:1"}},
        {"mountPath": "/scratch", "emptyDir": {"sizeLimit": "10Gi"}},
    ],
}

REFUSED = {
    "own label": ({"labels": {"alignment.dev/run": "x"}}, "a key is the operator's own"),
    "queue": ({"labels": {"kueue.x-k8s.io/queue-name": "x"}}, "a key is the operator's own"),
    "own annotation": ({"annotations": {"alignment.dev/phase-file": "{}"}}, "a key is the operator's own"),
    "no key": ({"labels": {"a b": "x"}}, "a key is NAME or PREFIX/NAME"),
    "no values": ({"affinity": {"nodes": [{"key": "a"}]}}, "Exists and DoesNotExist have no values, others do"),
    "root": ({"securityContext": {"runAsUser": 0}}, "greater than or equal to 1"),
    "two kinds": ({"volumes": [{"mountPath": "/a", "emptyDir": {}, "csi": {"driver": "a"}}]}, "set exactly one of"),
    "one place twice": ({"volumes": [{"mountPath": "/a", "emptyDir": {}}] * 2}, "Duplicate value"),
    "a variable twice": (
        {"env": [{"name": "A"}, {"name": "B"}, {"name": "A", "value": "x"}]},
        "env[2]: Duplicate value",
    ),
    "a Secret twice": ({"secretRefs": ["a", "a"]}, "secretRefs[1]: Duplicate value"),
    "a pull secret twice": ({"imagePullSecrets": ["a", "a"]}, "imagePullSecrets[1]: Duplicate value"),
    "one spread twice": (
        {"topologySpreadConstraints": [{"topologyKey": "a"}] * 2},
        "topologySpreadConstraints[1]: Duplicate",
    ),
    "the phase's place": ({"claims": [{"claimName": "a", "mountPath": "/etc/alignment"}]}, "the pod's own"),
    "the node's folder": ({"volumes": [{"mountPath": "/a", "hostPath": {"path": "/"}}]}, "hostPath"),
}


@pytest.mark.parametrize("where", ["run", "phase"])
def test_what_cannot_be_is_refused_at_once(prepared: Cluster, where: str):
    for template, message in REFUSED.values():
        phase = {**sft(), **({"template": template} if where == "phase" else {})}
        run = manifest("run", phase, **({"template": template} if where == "run" else {}))
        # As users do: what is applied server-side would be refused for the key alone where it is twice in a list.
        answer = prepared.kubectl("create", "--dry-run=server", "-f", "-", input=json.dumps(run), check=False)
        assert message in answer, f"{template}: {answer}"


def test_nothing_of_a_pod_is_lost_on_its_way(driver: Driver):
    """The Training Operator's schema of pods drops what it does not know."""
    driver.apply(manifest("run", sft(), template=EVERYTHING))
    worker = driver.until_job("run-sft-1")["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    pod = driver.until_pod("run-sft-1-worker-0")
    for key in ("labels", "annotations"):
        assert EVERYTHING[key].items() <= pod["metadata"][key].items()
    assert (worker["spec"]["securityContext"]["runAsUser"], pod["spec"]["schedulerName"]) == (4711, "volcano")
    assert pod["spec"]["affinity"] == worker["spec"]["affinity"]
    assert len(pod["spec"]["topologySpreadConstraints"]) == 1
    assert pod["spec"]["resourceClaims"] == [{"name": "gpu", "resourceClaimTemplateName": "one-gpu"}]
    [container] = pod["spec"]["containers"]
    assert (container["imagePullPolicy"], container["resources"]["claims"]) == ("Always", [{"name": "gpu"}])
    kinds = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert "ephemeral" in volumes[kinds["/tmp"]]
    assert "csi" in volumes[kinds["/cache"]]
    assert "emptyDir" in volumes[kinds["/scratch"]]


def test_a_phase_keeps_what_its_template_does_not_say(driver: Driver):
    claim = {"claimName": "data", "mountPath": "/data", "readOnly": True}
    common = {"image": "nothing:1", "claims": [claim], "secretRefs": ["hub"], "nodeSelector": {"pool": "a"}}
    run = manifest("run", {**sft(), "template": {"labels": {"a": "b"}}}, template={**common, "graceSeconds": 30})
    driver.apply(run)
    pod = driver.until_job("run-sft-1")["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    assert (pod["nodeSelector"], pod["terminationGracePeriodSeconds"]) == ({"pool": "a"}, 30)
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "hub"}}]
    assert "/data" in [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]


def test_a_null_is_as_good_as_nothing(driver: Driver):
    run = manifest("run", sft(seed=None, lora=None), template={"image": "nothing:1", "affinity": None, "nodes": None})
    driver.apply(run)
    driver.until_job("run-sft-1")


def test_an_edit_of_labels_reruns_nothing(driver: Driver):
    driver.apply(manifest("run", sft()))
    driver.start("run-sft-1")
    driver.succeed("run-sft-1")
    driver.until_condition("run", "Succeeded")
    driver.patch("run", {"template": {"labels": {"team": "b"}}})
    driver.cluster.wait(lambda: driver.status("run")["observedGeneration"] == 2, 30, "the edit is seen")
    assert driver.condition("run", "Succeeded")["status"] == "True"
    assert driver.job_names() == ["run-sft-1"]


def test_a_sidecar_that_goes_on_does_not_keep_the_job(driver: Driver):
    driver.apply(manifest("run", sft()))
    driver.start("run-sft-1")
    digest = driver.until_job("run-sft-1")["metadata"]["annotations"]["alignment.dev/digest"]
    word = json.dumps({"digest": digest, "artifactDigest": "made"})
    ended = {"exitCode": 0, "message": word, "reason": "Completed", "startedAt": now(), "finishedAt": now()}
    common = {"image": "x", "imageID": "", "ready": False, "restartCount": 0}
    statuses = [
        {"name": "proxy", **common, "state": {"running": {"startedAt": now()}}},
        {"name": "pytorch", **common, "state": {"terminated": ended}},
    ]
    driver.cluster.patch_status(
        "pod", "run-sft-1-worker-0", driver.namespace, {"phase": "Running", "containerStatuses": statuses}
    )
    driver.until_condition("run", "Succeeded", timeout=90)
    assert driver.phase("run", "sft")["artifactDigest"] == "made"

    def deleted() -> bool:
        # The kubelet's part: nobody else ends a pod.
        with contextlib.suppress(KubectlError):
            driver.cluster.kubectl("delete", "pod", "run-sft-1-worker-0", "-n", driver.namespace, "--force")
        return driver.job_names() == []

    driver.cluster.wait(deleted, 30, "the job is gone")
