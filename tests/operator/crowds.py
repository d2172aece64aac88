"""Thousands of runs that have ended, and thousands that train: what they cost an operator that has little to do."""

import http.client
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import psutil
from cluster.client import Cluster
from cluster.kube_http import call, connect
from driver import ROOT, OperatorProcess, now
from ends import watched_ends
from scale import PREFIX, counters, scripted

Object = dict[str, Any]
RUNS = "/apis/alignment.dev/v1alpha1/namespaces/{}/alignmentruns"
PODS = "/api/v1/namespaces/{}/pods"
WRITERS = 4


@dataclass(frozen=True)
class Spent:
    """Of an operator, within some seconds."""

    seconds: float
    cpu_seconds: float
    status_writes: float
    reads: float
    rss_mb: float

    def __str__(self) -> str:
        return (
            f"{self.cpu_seconds:.1f} CPU-s, {self.status_writes:.0f} status writes, {self.reads:.0f} reads in "
            f"{self.seconds:.0f} s, {self.rss_mb:.0f} MB"
        )


def spent(operator: OperatorProcess, seconds: float) -> Spent:
    """While nobody does anything but wait."""
    process = _process(operator)
    before, cpu = counters(operator), sum(process.cpu_times()[:2])
    time.sleep(seconds)
    used = sum(process.cpu_times()[:2]) - cpu
    after = counters(operator)
    return Spent(
        seconds,
        used,
        after["writes"] - before["writes"],
        after["reads"] - before["reads"],
        process.memory_info().rss / 2**20,
    )


def add_ended(cluster: Cluster, namespace: str, ended: Object, count: int) -> None:
    """So many runs that have ended as this one has."""
    spec = {**ended, "metadata": {"namespace": namespace}}
    status = {**ended["status"], "jobsDeleted": True}  # after their time, as most of so many

    def add(connection: http.client.HTTPSConnection, number: int) -> None:
        name = f"ended-{number}"
        call(connection, "POST", RUNS.format(namespace), {**spec, "metadata": {"name": name}})
        call(connection, "PATCH", f"{RUNS.format(namespace)}/{name}/status", {"status": status})

    _side_by_side(cluster, add, count)


def _side_by_side(cluster: Cluster, write: Callable[[http.client.HTTPSConnection, int], None], count: int) -> None:
    """Each number once. kubectl would take a minute for a hundred."""

    def some(first: int) -> None:
        connection = connect(cluster)
        for number in range(first, count, WRITERS):
            write(connection, number)

    with ThreadPoolExecutor(WRITERS) as threads:
        list(threads.map(some, range(WRITERS)))


def seen(operator: OperatorProcess, namespace: str, state: str) -> float:
    return operator.metric(f"{PREFIX}runs", namespace=namespace, state=state)


def started(cluster: Cluster, operator: OperatorProcess, namespace: str, count: int) -> tuple[float, float]:
    """Starts it anew. Seconds until it has looked at all of so many ended runs, and the CPU-seconds of that."""
    operator.stop()
    begun = time.monotonic()
    operator.start()
    cluster.wait(lambda: seen(operator, namespace, "Succeeded") >= count, 300, "all runs are seen")
    return time.monotonic() - begun, peers.cpu(_process(operator))


def kopf_started(cluster: Cluster, operator: OperatorProcess, count: int, notes: Path) -> tuple[float, float, float]:
    """The same of a kopf that does nothing, until it was told of so many runs; and its megabytes."""
    begun = time.monotonic()
    with peers.kopf_beside(operator.kubeconfig, notes) as kopf:
        assert kopf is not None
        told = f"runs {count}\n"
        cluster.wait(lambda: notes.exists() and told in notes.read_text(), 300, "it is told of all runs", every=0.2)
        return time.monotonic() - begun, peers.cpu(kopf), peers.megabytes(kopf)


def train(cluster: Cluster, operator: OperatorProcess, namespace: str, count: int) -> None:
    """So many runs whose phases go on for ever, until all are seen to run."""
    runs = [scripted(f"train-{i}") for i in range(count)]
    for run in runs:
        for phase in run["spec"]["phases"]:
            phase["template"]["env"].append({"name": "TEST_POD_OUTCOME", "value": "forever"})
    _side_by_side(cluster, lambda line, number: call(line, "POST", RUNS.format(namespace), runs[number]), count)
    wanted = f"{count} runs train"
    cluster.wait(lambda: seen(operator, namespace, "Running") >= count, 60 + count, wanted, every=_seldom(count))


def _seldom(count: int) -> float:
    """A page of metrics of nine thousand runs takes the operator a second: asked for each second it did little else."""
    return max(1.0, count / 500)


def wait_in_a_queue(cluster: Cluster, operator: OperatorProcess, namespace: str, count: int) -> float:
    """So many runs whose jobs nobody admits; seconds until all are seen to wait."""
    runs = [scripted(f"queued-{i}") for i in range(count)]
    for run in runs:
        run["spec"]["queueName"] = "full"
    begun = time.monotonic()
    _side_by_side(cluster, lambda line, number: call(line, "POST", RUNS.format(namespace), runs[number]), count)
    wanted = f"{count} runs wait in their queue"
    cluster.wait(lambda: seen(operator, namespace, "Queued") >= count, 60 + count, wanted, every=_seldom(count))
    return time.monotonic() - begun


@dataclass(frozen=True)
class Successions:
    """Of runs that train, some of which end a phase."""

    per_second: float
    last: float
    """Seconds from the slowest job's end to the next one's creation."""
    look_ms: float
    wait_ms: float
    status_writes: float
    seconds: float
    beside: str
    """What the operator and others have spent on it."""

    def __str__(self) -> str:
        return (
            f"{self.per_second:g} ends a second: the last job follows {1000 * self.last:.0f} ms after the end; a look takes "
            f"{self.look_ms:.1f} ms after {self.wait_ms:.0f} ms in the queue; {self.status_writes:.0f} status writes in "
            f"{self.seconds:.0f} s\n{self.beside}"
        )


def successions(
    cluster: Cluster, operator: OperatorProcess, namespace: str, per_second: float, seconds: float, notes: Path | None
) -> Successions:
    """End the first phases of some runs that train, one after another."""
    with watched_ends(cluster, namespace) as ends, peers.kopf_beside(operator.kubeconfig, notes) as kopf:
        time.sleep(10 if notes else 1)  # they list what is there
        pods = _first_pods(cluster, namespace)[: int(per_second * seconds)]
        watch, before, begun = peers.Watch(cluster, operator, kopf), counters(operator), time.monotonic()
        connection, patched = connect(cluster), {}
        for number, pod in enumerate(pods):
            time.sleep(max(0.0, begun + number / per_second - time.monotonic()))
            patched[pod["metadata"]["labels"]["training.kubeflow.org/job-name"]] = time.time()
            call(connection, "PATCH", f"{PODS.format(namespace)}/{pod['metadata']['name']}/status", _succeeded(pod))
        cluster.wait(lambda: len(ends.gaps()) >= len(pods), 120, f"{len(pods)} jobs follow")
        took, after = time.monotonic() - begun, counters(operator)
        did = {name: value - before[name] for name, value in after.items()}
        lags = {
            peers.OPERATOR: ends.gaps(),
            peers.TRAINING_OPERATOR: [ends.ended[job] - at for job, at in patched.items()],
        }
        lags |= {peers.KOPF: peers.told_of_ends(notes, ends)} if notes else {}
        return Successions(
            per_second,
            max(ends.gaps()),
            1000 * did["look_seconds"] / did["looks"],
            1000 * did["wait_seconds"] / did["looks"],
            did["writes"],
            took,
            peers.table(watch.spent(), len(pods), "phase", lags),
        )


def _first_pods(cluster: Cluster, namespace: str) -> list[Object]:
    found = cluster.items("pods", "-n", namespace, "-l", "alignment.dev/phase=sft")
    return [pod for pod in found if pod["status"].get("phase") == "Running"]


def _succeeded(pod: Object) -> Object:
    """As the kubelet says it of a pod whose phase has left its result."""
    container = pod["spec"]["containers"][0]
    said = next(variable["value"] for variable in container["env"] if variable["name"] == "TEST_POD_MESSAGE")
    end = {"exitCode": 0, "reason": "Completed", "message": said, "finishedAt": now(), "startedAt": now()}
    state = {"name": container["name"], "image": container["image"], "imageID": "", "ready": False, "restartCount": 0}
    return {"status": {"phase": "Succeeded", "containerStatuses": [{**state, "state": {"terminated": end}}]}}


@contextmanager
def trainers() -> Iterator[None]:
    """They answer for the pods of fake nodes, in a process of their own."""
    with subprocess.Popen([sys.executable, str(Path(__file__).with_name("trainer_page.py"))], cwd=ROOT) as process:
        try:
            yield
        finally:
            process.kill()


def _process(operator: OperatorProcess) -> psutil.Process:
    assert operator.process is not None
    return psutil.Process(operator.process.pid)
