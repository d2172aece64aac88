"""pytest plugin: this project on real nodes, installed as its manifests say, and runs in it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster import product
from cluster.assets import locate
from cluster.client import Cluster
from cluster.demo import install_operator
from cluster.jobs import KINDS

Object = dict[str, Any]
# How a sum is split over threads changes its last digits, and runs here are compared to the bit.
ONE_THREAD = [{"name": "OMP_NUM_THREADS", "value": "1"}]


@dataclass
class Runs:
    """A restricted namespace with a workspace and the trainers' packages."""

    cluster: Cluster
    namespace: str
    workspace: Path

    def apply(self, name: str, spec: Object, **template: Any) -> None:
        own = spec.get("template", {})
        merged = {
            **product.TEMPLATE,
            **own,
            **template,
            "env": [
                *{
                    entry["name"]: entry for entry in [*ONE_THREAD, *own.get("env", []), *template.get("env", [])]
                }.values()
            ],
        }
        document = {
            "apiVersion": "alignment.dev/v1alpha1", "kind": "AlignmentRun", "metadata": {"name": name},
            "spec": {"workspace": {"claimName": product.WORKSPACE_CLAIM}, **spec, "template": merged},
        }  # fmt: skip
        self.cluster.apply(document, self.namespace)

    def kubectl(self, *arguments: str, **more: Any) -> str:
        return self.cluster.kubectl("-n", self.namespace, *arguments, **more)

    def status(self, name: str) -> Object:
        return self.cluster.get("arun", name, "-n", self.namespace).get("status", {})

    def phase(self, name: str, phase: str) -> Object:
        return next((p for p in self.status(name).get("phases", []) if p["name"] == phase), {})

    def wait(self, what: str, predicate: Any, timeout: float = 120) -> Any:
        try:
            return self.cluster.wait(predicate, timeout, what)
        except TimeoutError:
            runs = self.kubectl("get", "arun", "-o", "json", check=False)
            raise AssertionError(f"{what} (after {timeout:g} s): {_short(runs)}\n{self._scene()}") from None

    def until_succeeded(self, name: str, timeout: float = 300) -> Object:
        def ended() -> Object | None:
            status = self.status(name)
            return status if {"Succeeded", "Failed"} & _true(status) else None

        status = self.wait(f"{name} ends", ended, timeout)
        assert "Succeeded" in _true(status), f"{_short(json.dumps(status))}\n{self._scene()}"
        return status

    def folder(self, run: str) -> Path:
        """A run's, in the workspace."""
        return self.workspace / f"{self.namespace}.{run}"

    def checkpoints(self, run: str, phase: str) -> list[int]:
        folder = self.folder(run) / phase / "checkpoints"
        return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))

    def until_checkpoint(self, run: str, phase: str, at_least: int = 1, timeout: float = 120) -> int:
        """Some step after which work is saved: the run is in the middle of training."""

        def newest() -> int | None:
            steps = self.checkpoints(run, phase)
            return steps[-1] if steps and steps[-1] >= at_least else None

        return self.wait(f"{run}/{phase} has a checkpoint", newest, timeout)

    def result(self, run: str, phase: str) -> Object:
        return json.loads((self.folder(run) / phase / "result.json").read_text())

    def pod(self, job: str, index: int = 0) -> Object:
        """Whatever kind of job it is. The newest in its place."""
        found = [
            pod
            for kind in KINDS.values()
            for pod in self.cluster.items("pods", "-n", self.namespace, "-l", kind.pod(job, index))
        ]
        return max(found, key=lambda pod: pod["metadata"]["creationTimestamp"])

    def _scene(self) -> str:
        return self.kubectl("get", "pytorchjobs,trainjobs,jobsets,jobs,pods", "-o", "wide", check=False)


def _true(status: Object) -> set[str]:
    return {c["type"] for c in status.get("conditions", []) if c["status"] == "True"}


def _short(text: str) -> str:
    return text if len(text) < 6000 else f"{text[:3000]} ... {text[-3000:]}"


@pytest.fixture(scope="session")
def installed(node_cluster: Cluster) -> Cluster:
    """Two nodes with the operator as a Deployment, and the trainers' image."""
    install_operator(node_cluster, locate())
    node_cluster.load_image(product.trainer_image(locate(), node_cluster.state / "images" / "trainer.tar"))
    return node_cluster


@pytest.fixture
def runs(installed: Cluster) -> Iterator[Runs]:
    with place_for_runs(installed) as place:
        yield place


@contextmanager
def place_for_runs(installed: Cluster) -> Iterator[Runs]:
    namespace = installed.namespace("run")
    workspace = installed.state / "workspaces" / namespace
    installed.apply(product.claims(namespace, workspace))
    for claim in (product.WORKSPACE_CLAIM, product.ENVIRONMENT_CLAIM):
        installed.kubectl(
            "wait", f"pvc/{claim}", "-n", namespace, "--for=jsonpath={.status.phase}=Bound", "--timeout=60s", timeout=70
        )
    yield Runs(installed, namespace, workspace)
    installed.delete_namespace(namespace)
