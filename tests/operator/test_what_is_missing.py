"""What a cluster may lack: the kind of runs, an integration or version of Kueue, Kubeflow's Trainer. On one of the tests' own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import launch
from cluster.client import Cluster
from cluster.controllers import FRAMEWORKS, MANAGES_ALL
from cluster.kube_http import Server
from driver import ROOT, Driver, Object, OperatorProcess, free_port, manifest, sft
from kueue import quota

WORKLOADS, KUEUE = "workloads.kueue.x-k8s.io", "app.kubernetes.io/name=kueue"
NOW = "2026-01-01T00:00:00Z"
TRAINER = ("trainjobs", "trainingruntimes", "clustertrainingruntimes")


@pytest.fixture(scope="module")
def lacking(prepared: Cluster) -> Iterator[tuple[Cluster, Path]]:
    """An API server without the kind of runs, whose Kueue takes all TrainJobs and no PyTorchJobs; credentials of an operator."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(FRAMEWORKS, "trainer.kubeflow.org/trainjob")
        environment.setenv(MANAGES_ALL, "true")
        running = launch.start("api", 0)
    try:
        cluster = Cluster("api", Path(running.info["kubeconfig"]), prepared.kubectl_binary, running.state)
        for name in ("namespace", "rbac"):
            cluster.apply(ROOT / f"manifests/base/{name}.yaml")
        yield cluster, cluster.service_account_kubeconfig("alignment-system", "alignment-operator")
    finally:
        running.stop()


def test_an_integration_that_is_switched_off(lacking: tuple[Cluster, Path], tmp_path: Path):
    """As Kueue 0.19 comes: it ignores the queue's label without a word, and the job runs at once."""
    cluster, mine = lacking
    cluster.kubectl("delete", "crd", "alignmentruns.alignment.dev", "--ignore-not-found")
    operator = OperatorProcess(mine, free_port(), tmp_path / "log").start()
    # Started too early: it says what is missing, and goes on by itself once that is there.
    missing = "the cluster has no alignmentruns.alignment.dev: apply manifests/base/crd.yaml"
    cluster.wait(lambda: missing in operator.get("readyz")[1], 30, missing)
    cluster.apply(ROOT / "manifests/base/crd.yaml")
    cluster.wait(lambda: operator.get("readyz")[0] == 200, 30, "the operator is ready")
    driver = Driver(cluster, cluster.namespace("off"))
    driver.apply(manifest("run", sft(), queueName="gpus"))
    told = driver.until_condition("run", "Admitted", "False", reason="Missing", timeout=60)
    assert "its integration kubeflow.org/pytorchjob is switched off; it runs unqueued" in told["message"]
    job = driver.until_job("run-sft-1")
    assert not job["spec"]["runPolicy"].get("suspend")
    _kueue_holds_what_names_no_queue(Driver(cluster, cluster.namespace("held"), "TrainJob"))
    # Under the operator's eyes Kueue becomes one of before v1beta2, and its word is heard.
    _serve_only_v1beta1(cluster)
    _say_of(driver, job, "an older Kueue has let it go")
    driver.until_condition("run", "Admitted", timeout=60)
    assert driver.phase("run", "sft")["queue"]["message"] == "an older Kueue has let it go"
    operator.stop()


def _kueue_holds_what_names_no_queue(driver: Driver) -> None:
    """It manages jobs without its label too, and its own word for it is that LocalQueue "" does not exist."""
    driver.apply(manifest("run", sft(), failurePolicy={"startupTimeoutSeconds": 60}))
    said = "this run names none: set spec.queueName"
    driver.until_condition("run", "Admitted", "False", reason="Missing", message=said, timeout=60)
    assert driver.status("run")["phase"] == "Queued"
    driver.cluster.apply(quota(driver.namespace, "1"))
    driver.patch("run", {"queueName": "alignment"})
    driver.until_condition("run", "Admitted", timeout=60)
    [*_, job] = driver.job_names()
    driver.succeed(job)
    driver.until_condition("run", "Succeeded")


def _serve_only_v1beta1(cluster: Cluster) -> None:
    """As the API server had it before Kueue's v1beta2: Kueue itself goes on, and is not asked about what this test makes."""
    cluster.kubectl("delete", "mutatingwebhookconfigurations,validatingwebhookconfigurations", "-l", KUEUE)
    crd = cluster.get("crd", WORKLOADS)
    versions = [{**one, "served": one["name"] == "v1beta1"} for one in crd["spec"]["versions"]]
    changes = {"spec": {"versions": versions, "conversion": {"strategy": "None", "webhook": None}}}
    Server(cluster).merge(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{WORKLOADS}", changes)


def _say_of(driver: Driver, job: Object, words: str) -> None:
    """A Workload of this job, as Kueue makes them, that is admitted with these words."""
    path = f"/apis/kueue.x-k8s.io/v1beta1/namespaces/{driver.namespace}/workloads"
    uid, owner = job["metadata"]["uid"], {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "controller": True}
    pods = {"spec": {"containers": [{"name": "pytorch", "image": "nothing:1"}], "restartPolicy": "Never"}}
    workload = {
        "apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "Workload",
        "metadata": {
            "name": "of-run", "labels": {"kueue.x-k8s.io/job-uid": uid},
            "ownerReferences": [{**owner, "name": job["metadata"]["name"], "uid": uid}],
        },
        "spec": {"queueName": "gpus", "podSets": [{"name": "main", "count": 1, "template": pods}]},
    }  # fmt: skip
    driver.cluster.wait(lambda: "items" in (driver.server.get(path) or {}), 30, "v1beta1 is served")
    driver.server.create(path, workload)
    told = {"type": "Admitted", "status": "True", "reason": "Admitted", "message": words, "lastTransitionTime": NOW}
    driver.server.merge(f"{path}/of-run/status", {"status": {"conditions": [told]}})


def test_where_the_trainer_is_not_installed(lacking: tuple[Cluster, Path], tmp_path: Path):
    """A run that asks for it is told; other runs go on; and once it is there, a new start of the operator has it."""
    cluster, mine = lacking
    crds = [cluster.get("crd", f"{name}.trainer.kubeflow.org") for name in TRAINER]
    for crd in crds:
        cluster.kubectl("delete", "crd", crd["metadata"]["name"], timeout=60)
    cluster.define(ROOT / "manifests/base/crd.yaml")
    operator = OperatorProcess(mine, free_port(), tmp_path / "log").start()
    cluster.wait(lambda: operator.get("readyz")[0] == 200, 60, "the operator is ready")
    asks, other = (Driver(cluster, cluster.namespace("missing"), kind) for kind in ("TrainJob", "PyTorchJob"))
    asks.apply(manifest("run", sft()))
    why = (
        "spec.backend: TrainJob: the cluster has no trainjobs.trainer.kubeflow.org that the operator may read; install"
    )
    asks.until_condition("run", "Accepted", "False", message=why)
    other.apply(manifest("run", sft()))
    other.succeed("run-sft-1")
    other.until_condition("run", "Succeeded")
    for crd in crds:
        cluster.define(
            {
                **{key: crd[key] for key in ("apiVersion", "kind", "spec")},
                "metadata": {"name": crd["metadata"]["name"]},
            }
        )
    assert operator.process is not None
    assert operator.process.wait(120) == 0, "it ends, to be started again"
    operator.start()
    asks.until_job("run-sft-1", timeout=120)
    operator.stop()
