"""Runs of which tests write the statuses, for commands against an API server."""

import subprocess
import sys
from typing import Any

import pytest
from builders import document, dpo, reward, sft
from cluster.client import Cluster

from controller import cli
from generate.files import ROOT

PROGRAM = "from controller.cli import main; main()"
CREATED = "2026-01-01T00:00:00Z"


class Bench:
    """A namespace with runs in it, and `alignctl` that looks there."""

    def __init__(self, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
        self.cluster = cluster
        self.capsys = capsys
        self.namespace = cluster.namespace("alignctl", restricted=False)
        self.kubeconfig = cluster.kubeconfig

    def define_runs(self) -> None:
        self.cluster.apply(ROOT / "manifests/base/crd.yaml")
        get = ("get", "alignmentruns", "-n", self.namespace)
        self.cluster.wait(lambda: "No resources" in self.cluster.kubectl(*get, check=False), what="runs are served")

    def run(self, name: str = "helpful", **spec: Any) -> None:
        run = document(sft("base"), dpo("dpo", "base"), reward("reward", "base"), workspace={"claimName": "w"}, **spec)
        self.cluster.apply({**run, "metadata": {"name": name}}, self.namespace)

    def get(self, name: str = "helpful") -> dict[str, Any]:
        return self.cluster.get("alignmentrun", name, "-n", self.namespace)

    def write(
        self, *phases: dict[str, Any], name: str = "helpful", held: dict[str, str] | None = None, **more: Any
    ) -> None:
        """A status as the operator writes it; ``held`` are the conditions that hold, with their messages."""
        conditions = [condition("Accepted", "")] + [condition(kind, message) for kind, message in (held or {}).items()]
        status = {"observedGeneration": self.get(name)["metadata"]["generation"], "conditions": conditions}
        self.cluster.patch_status("alignmentrun", name, self.namespace, {**status, "phases": list(phases), **more})

    def pod(self, of: str, attempt: int = 1, index: int = 0, node: str | None = None, **status: Any) -> str:
        labels = {"alignment.dev/run": "helpful", "alignment.dev/phase": of, "alignment.dev/attempt": str(attempt)}
        labels["training.kubeflow.org/replica-index"] = str(index)
        name = f"helpful-{of}-{attempt}-worker-{index}"
        spec = {"containers": [{"name": "pytorch", "image": "trainer:1"}], "nodeName": node}
        metadata = {"name": name, "labels": labels, "ownerReferences": [self.job(f"helpful-{of}-{attempt}")]}
        self.cluster.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}, self.namespace)
        if status:
            self.cluster.patch_status("pod", name, self.namespace, status)
        return name

    def job(self, name: str) -> dict[str, Any]:
        """A job whose pods the test makes, since it says that another controller does. Returns the reference to it."""
        template = {"spec": {"containers": [{"name": "pytorch", "image": "trainer:1"}]}}
        spec = {
            "runPolicy": {"managedBy": "kueue.x-k8s.io/multikueue"},
            "pytorchReplicaSpecs": {"Worker": {"replicas": 1, "restartPolicy": "Never", "template": template}},
        }
        kind = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob"}
        self.cluster.apply({**kind, "metadata": {"name": name}, "spec": spec}, self.namespace)
        uid = self.cluster.get("pytorchjob", name, "-n", self.namespace)["metadata"]["uid"]
        return {**kind, "name": name, "uid": uid, "controller": True}

    def arguments(self, *arguments: str) -> list[str]:
        return [*arguments, "-n", self.namespace, "--kubeconfig", str(self.kubeconfig)]

    def call(self, *arguments: str) -> tuple[int, str]:
        """Exit status, and what was printed."""
        self.capsys.readouterr()
        before, sys.argv = sys.argv, ["alignctl", *self.arguments(*arguments)]
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.argv = before
        captured = self.capsys.readouterr()
        return code, captured.out + captured.err

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        # A shell's background jobs ignore SIGINT, and so would all that they start: as at a terminal, it counts here.
        heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        command = [sys.executable, "-P", "-c", heed + PROGRAM, *self.arguments(*arguments)]
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def condition(kind: str, message: str) -> dict[str, str]:
    return {"type": kind, "status": "True", "reason": "Because", "message": message, "lastTransitionTime": CREATED}


def phase(name: str, state: str, *attempts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "type": "sft", "state": state, "attempts": list(attempts), **more}


def attempt(number: int = 1, state: str = "Running", **more: Any) -> dict[str, Any]:
    return {"number": number, "digest": "d", "state": state, **more}


DONE = attempt(1, "Succeeded", startedAt=CREATED, finishedAt="2026-01-01T00:01:00Z")
BASE = phase("base", "Succeeded", DONE, startedAt=CREATED, finishedAt="2026-01-01T00:01:00Z")
