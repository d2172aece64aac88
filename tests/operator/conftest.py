"""An operator with its own rights against a real API server, Training Operator, Trainer and Kueue."""

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster.client import Cluster
from cluster.kube_http import Server
from driver import ROOT, Driver, OperatorProcess, free_port


@pytest.fixture(scope="session")
def prepared(api_cluster: Cluster) -> Cluster:
    """The CRD and the operator's rights, as shipped."""
    api_cluster.define(ROOT / "manifests/base/crd.yaml")
    for name in ("namespace", "rbac"):
        api_cluster.apply(ROOT / f"manifests/base/{name}.yaml")
    # Tests of the manifests leave the Lease of them here, and an operator makes it where there is none.
    api_cluster.kubectl("delete", "lease", "--all", "-n", "alignment-system")
    return api_cluster


@pytest.fixture(scope="session")
def operator_factory(
    prepared: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., OperatorProcess]]:
    folder = tmp_path_factory.mktemp("operators")
    made: list[OperatorProcess] = []

    def make(*arguments: str, kubeconfig: Path | None = None) -> OperatorProcess:
        mine = kubeconfig or prepared.service_account_kubeconfig("alignment-system", "alignment-operator")
        operator = OperatorProcess(mine, free_port(), folder / f"{len(made)}.log", arguments)
        made.append(operator)
        return operator

    yield make
    for operator in made:
        if operator.process is not None and operator.process.poll() is None:
            operator.stop("kill")


@pytest.fixture(scope="session")
def operator(operator_factory: Callable[..., OperatorProcess], prepared: Cluster) -> OperatorProcess:
    """The one that most tests share: a user of them cannot tell it from one in a pod."""
    running = operator_factory("--metrics-readers", "[]").start()
    prepared.wait(lambda: running.get("readyz")[0] == 200, 120, "the operator is ready")
    return running


@pytest.fixture
def driver(request: pytest.FixtureRequest, prepared: Cluster, operator: OperatorProcess) -> Iterator[Driver]:
    """Of PyTorchJobs; those of tests that are of ``both`` once of each kind."""
    server, name = Server(prepared), f"op-{secrets.token_hex(3)}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    server.create("/api/v1/namespaces", {"metadata": {"name": name, "labels": labels}})
    prepared.created.append(name)
    account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
    prepared.wait(lambda: server.get(account), 30, f"the ServiceAccount of {name}")
    yield Driver(prepared, name, getattr(request, "param", "PyTorchJob"))
    server.delete(f"/api/v1/namespaces/{name}")
