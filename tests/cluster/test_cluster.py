"""The test cluster itself: every tier comes up, does what the other tests rely on, and leaves nothing."""

import pytest

from cluster.client import Cluster, KubectlError


def pytorchjob(name: str, container: str = "pytorch", replicas: int = 2, **pod: object) -> dict:
    template = {
        "metadata": pod.pop("metadata", {}),
        "spec": {"restartPolicy": "Never", "containers": [{"name": container, "image": "local/python:1", **pod}]},
    }
    worker = {"replicas": replicas, "restartPolicy": "Never", "template": template}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name},
        "spec": {"runPolicy": {"cleanPodPolicy": "Running"}, "pytorchReplicaSpecs": {"Worker": worker}},
    }


def test_the_real_webhook_refuses_a_job_without_a_pytorch_container(api_cluster: Cluster) -> None:
    namespace = api_cluster.namespace()
    with pytest.raises(KubectlError, match="pytorch"):
        api_cluster.apply(pytorchjob("wrong", container="main"), namespace)


def test_the_training_operator_makes_pods(api_cluster: Cluster) -> None:
    namespace = api_cluster.namespace(restricted=False)
    api_cluster.apply(pytorchjob("good"), namespace)
    pods = api_cluster.wait(lambda: api_cluster.items("pods", "-n", namespace), 20, "pods")
    assert pods[0]["status"]["phase"] == "Pending"
