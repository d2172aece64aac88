"""Plays the kubelet where no node runs pods: writes what it would write. Everything else in these tests is real."""

import json
import os
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from cluster.client import Cluster, KubectlError
from cluster.jobs import KINDS, Kind
from cluster.kube_http import Server

Object = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]

ROWS = {"train": [{"synthetic": {"task": "letters", "split": "demonstrations", "count": 8}}]}
PAIRS = {"train": [{"synthetic": {"task": "letters", "split": "preferences", "count": 8}}]}
MODEL = {"scratch": {"hiddenSize": 8, "numLayers": 1, "tokenizer": {"trainOn": ROWS["train"]}}}
FAST = {"backoff": {"initialSeconds": 0.1, "maxSeconds": 0.1}}


def sft(name: str = "sft", **settings: Any) -> Object:
    return {"name": name, "sft": {"data": ROWS, **settings}}


def dpo(name: str = "dpo", on: str = "sft", **settings: Any) -> Object:
    return {"name": name, "dpo": {"policy": {"phase": on}, "data": PAIRS, **settings}}


def manifest(name: str, *phases: Object, **spec: Any) -> Object:
    return {
        "apiVersion": "alignment.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": name},
        "spec": {
            "model": MODEL,
            "workspace": {"claimName": "work"},
            "template": {"image": "nothing:1"},
            "failurePolicy": FAST,
            "phases": list(phases or (sft(), dpo())),
            **spec,
        },
    }


SOAK = bool(os.environ.get("SOAK"))
both = pytest.mark.parametrize("driver", KINDS, indirect=True)
"""For a test that is of every kind of job."""
both_in_soak = pytest.mark.parametrize("driver", KINDS if SOAK else ["PyTorchJob"], indirect=True)
"""The same, where another test shows what the kinds have different."""


@dataclass
class Driver:
    """One namespace, and the hands of its kubelet."""

    cluster: Cluster
    namespace: str
    backend: str = "PyTorchJob"
    """Of its runs."""

    def __post_init__(self) -> None:
        self.server = Server(self.cluster)

    @property
    def kind(self) -> Kind:
        return KINDS[self.backend]

    def apply(self, run: Object) -> None:
        if run["kind"] == "AlignmentRun" and self.backend != "PyTorchJob":
            run = {**run, "spec": {"backend": self.backend, **run["spec"]}}
        if run["kind"] == "AlignmentRun":
            self.server.apply(self._path(run["metadata"]["name"]), run)
        else:
            self.cluster.apply(run, self.namespace)

    def patch(self, run: str, spec: Object) -> None:
        self.server.merge(self._path(run), {"spec": spec})

    def _path(self, run: str) -> str:
        return f"/apis/alignment.dev/v1alpha1/namespaces/{self.namespace}/alignmentruns/{run}"

    def edit_phase(self, run: str, phase: Object) -> None:
        """Replace one phase, as a user who edits the file and applies it again."""
        phases = self.run(run)["spec"]["phases"]
        self.patch(run, {"phases": [phase if p["name"] == phase["name"] else p for p in phases]})

    def no_more_jobs(self) -> None:
        """By a quota `none`."""
        quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"},
                 "spec": {"hard": {f"count/{self.kind.plural}": "0"}}}  # fmt: skip
        self.cluster.apply(quota, self.namespace)
        held = ("resourcequota", "none", "-n", self.namespace)
        self.cluster.wait(lambda: self.cluster.get(*held).get("status", {}).get("hard"), 30, "the quota holds")

    # -- what is there

    def run(self, name: str) -> Object:
        found = self.server.get(self._path(name))
        if found is None:
            raise KubectlError(f"there is no run {name} in {self.namespace}")
        return found

    def status(self, name: str) -> Object:
        return self.run(name).get("status", {})

    def phase(self, run: str, phase: str) -> Object:
        return next((p for p in self.status(run).get("phases", []) if p["name"] == phase), {})

    def condition(self, run: str, kind: str) -> Object:
        return next((c for c in self.status(run).get("conditions", []) if c["type"] == kind), {})

    def jobs(self) -> list[Object]:
        return self.server.items(self.kind.path(self.namespace))

    def job_names(self) -> list[str]:
        return sorted(job["metadata"]["name"] for job in self.jobs())

    def events(self, reason: str = "") -> list[Object]:
        """Of runs. With a reason once there is one: an event is written after the status that it is about."""
        path = f"/api/v1/namespaces/{self.namespace}/events"

        def found() -> list[Object]:
            ours = [e for e in self.server.items(path) if e["involvedObject"]["kind"] == "AlignmentRun"]
            return [e for e in ours if not reason or e["reason"] == reason]

        return self.cluster.wait(found, 30, f"event {reason}") if reason else found()

    # -- waiting

    def until_job(self, name: str, timeout: float = 30) -> Object:
        return self.cluster.wait(lambda: self._job(name), timeout, f"job {name} ({self.namespace})")

    def _job(self, name: str) -> Object | None:
        return self.server.get(f"{self.kind.path(self.namespace)}/{name}")

    def delete_job(self, name: str) -> None:
        self.server.delete(f"{self.kind.path(self.namespace)}/{name}")

    def template(self, job: str) -> Object:
        """Of its pods."""
        self.until_job(job)
        if self.backend == "PyTorchJob":
            return self.until_job(job)["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
        runtime = self.cluster.get("trainingruntime", job, "-n", self.namespace)
        return runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]

    def until_pod_of(self, job: str, index: int = 0) -> Object:
        """The newest in its place."""
        chosen = f"/api/v1/namespaces/{self.namespace}/pods?labelSelector={quote(self.kind.pod(job, index))}"

        def pod() -> Object | None:
            there = [pod for pod in self.server.items(chosen) if "deletionTimestamp" not in pod["metadata"]]
            return max(there, key=lambda pod: pod["metadata"]["creationTimestamp"], default=None)

        return self.cluster.wait(pod, 30, f"pod {index} of {job} ({self.namespace})")

    def until_pod(self, name: str) -> Object:
        def pod() -> Object | None:
            return self.server.get(f"/api/v1/namespaces/{self.namespace}/pods/{name}")

        return self.cluster.wait(pod, 30, f"pod {name} ({self.namespace})")

    def until_phase(self, run: str, phase: str, state: str, timeout: float = 30) -> Object:
        def reached() -> Object | None:
            found = self.phase(run, phase)
            return found if found.get("state") == state else None

        try:
            return self.cluster.wait(reached, timeout, f"phase {phase} of {run} is {state}")
        except TimeoutError:
            raise AssertionError(f"phase {phase} never was {state}: {json.dumps(self.status(run), indent=1)}") from None

    def until_condition(
        self, run: str, kind: str, status: str = "True", timeout: float = 30, reason: str = "", message: str = ""
    ) -> Object:
        def reached() -> Object | None:
            found = self.condition(run, kind)
            fits = found.get("status") == status and (not reason or found.get("reason") == reason)
            return found if fits and message in found.get("message", "") else None

        try:
            return self.cluster.wait(reached, timeout, f"{kind} of {run} is {status} {reason}")
        except TimeoutError:
            raise AssertionError(f"{kind} never was {status}: {json.dumps(self.status(run), indent=1)}") from None

    # -- the kubelet's hands

    def start(self, job: str, index: int = 0, address: str = "") -> None:
        self.write(job, index, "Running", {"running": {"startedAt": now()}}, address)

    def succeed(self, job: str, artifact: str = "", metrics: Object | None = None, index: int = 0) -> None:
        digest = self.until_job(job)["metadata"]["annotations"]["alignment.dev/digest"]
        said = {"digest": digest, "artifactDigest": artifact or f"artifact-of-{job}", "metrics": metrics or {}}
        self.end(job, 0, said, index=index)

    def fail(self, job: str, failure: str, message: str = "it went wrong", code: int = 1, index: int = 0) -> None:
        self.end(job, code, {"failure": failure, "message": message}, index=index)

    def end(self, job: str, code: int, said: Object | str, reason: str = "", index: int = 0) -> None:
        text = said if isinstance(said, str) else json.dumps(said)
        state = {"exitCode": code, "message": text, "reason": reason or ("Completed" if code == 0 else "Error")}
        state |= {"startedAt": now(), "finishedAt": now()}
        self.write(job, index, "Failed" if code else "Succeeded", {"terminated": state})

    def write(self, job: str, index: int, phase: str, state: Object, address: str = "") -> None:
        container = {
            "name": self.kind.container,
            "image": "nothing:1",
            "imageID": "",
            "ready": phase == "Running",
            "restartCount": 0,
        }
        status = {"phase": phase, "containerStatuses": [{**container, "state": state}]}
        status |= {"podIP": address, "podIPs": [{"ip": address}]} if address else {}
        name = self.until_pod_of(job, index)["metadata"]["name"]
        self.server.merge(f"/api/v1/namespaces/{self.namespace}/pods/{name}/status", {"status": status})


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class OperatorProcess:
    """`python -m controller` outside pods, with the rights that manifests/base/rbac.yaml gives it."""

    kubeconfig: Path
    port: int
    log: Path
    arguments: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> "OperatorProcess":
        command = [sys.executable, "-m", "controller", "--kubeconfig", str(self.kubeconfig), "--port", str(self.port)]
        command += ["--lease-namespace", "alignment-system", *self.arguments]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)
        return self

    def stop(self, how: str = "terminate", timeout: float = 20) -> int:
        assert self.process is not None
        getattr(self.process, how)()
        return self.process.wait(timeout)

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def metric(self, name: str, **labels: str) -> float:
        """As :func:`sample`. 0 while nobody answers."""
        code, page = self.get("metrics")
        return sample(page, name, **labels) if code == 200 else 0.0


def sample(page: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples; ``name`` may have labels, all of them in their order, and ``labels`` are some.

    One that does not exist is an error: a test would be true of its silence.
    """
    known = re.sub("_(count|sum|bucket)$", "", name.partition("{")[0])
    assert f"# HELP {known} " in page, f"there is no metric {known}"
    wanted = name if "{" in name else f"{name}{{"
    lines = [line for line in page.splitlines() if line.startswith(wanted) or line.split(" ")[0] == name]
    found = [line for line in lines if all(f'{key}="{value}"' in line for key, value in labels.items())]
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)
