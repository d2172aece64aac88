"""Thousands of runs that have ended, and thousands that train: what they cost an operator that has little to do."""

import http.client
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from cluster.client import Cluster
from driver import ROOT, OperatorProcess
from kube_http import call, connect
from scale import PREFIX, apply, counters, scripted

Object = dict[str, Any]
RUNS = "/apis/alignment.dev/v1alpha1/namespaces/{}/alignmentruns"
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
    cpu, before = sum(process.cpu_times()[:2]), counters(operator)
    time.sleep(seconds)
    after = counters(operator)
    return Spent(
        seconds,
        sum(process.cpu_times()[:2]) - cpu,
        after["writes"] - before["writes"],
        after["reads"] - before["reads"],
        process.memory_info().rss / 2**20,
    )


def add_ended(cluster: Cluster, namespace: str, ended: Object, count: int) -> None:
    """So many runs that have ended as this one has."""
    spec = {**ended, "metadata": {"namespace": namespace}}
    status = {**ended["status"], "jobsDeleted": True}  # after their time, as most of so many

    def add(first: int) -> None:
        connection = connect(cluster)
        for number in range(first, count, WRITERS):
            _add(connection, namespace, {**spec, "metadata": {"name": f"ended-{number}"}}, status)

    with ThreadPoolExecutor(WRITERS) as threads:
        list(threads.map(add, range(WRITERS)))


def _add(connection: http.client.HTTPSConnection, namespace: str, run: Object, status: Object) -> None:
    call(connection, "POST", RUNS.format(namespace), run)
    path = f"{RUNS.format(namespace)}/{run['metadata']['name']}/status"
    call(connection, "PATCH", path, {"status": status})


def seen(operator: OperatorProcess, namespace: str, state: str) -> float:
    return operator.metric(f"{PREFIX}runs", namespace=namespace, state=state)


def started(cluster: Cluster, operator: OperatorProcess, namespace: str, count: int) -> tuple[float, float]:
    """Starts it anew. Seconds until it has looked at all of so many ended runs, and the CPU-seconds of that."""
    operator.stop()
    begun = time.monotonic()
    operator.start()
    cluster.wait(lambda: seen(operator, namespace, "Succeeded") >= count, 300, "all runs are seen")
    return time.monotonic() - begun, sum(_process(operator).cpu_times()[:2])


def train(cluster: Cluster, operator: OperatorProcess, namespace: str, count: int) -> None:
    """So many runs whose first phase goes on for ever, until all are seen to run."""
    runs = [scripted(f"train-{i}") for i in range(count)]
    for run in runs:
        run["spec"]["phases"][0]["template"]["env"].append({"name": "TEST_POD_OUTCOME", "value": "forever"})
    apply(cluster, runs, namespace)
    wanted = f"{count} runs train"
    cluster.wait(lambda: seen(operator, namespace, "Running") >= count, 60 + count, wanted, every=1.0)


@contextmanager
def trainers() -> Iterator[None]:
    """They answer for the pods of fake nodes, in a process of their own."""
    with subprocess.Popen([sys.executable, str(Path(__file__).with_name("trainer_page.py"))], cwd=ROOT) as process:
        yield
        process.kill()


def _process(operator: OperatorProcess) -> psutil.Process:
    assert operator.process is not None
    return psutil.Process(operator.process.pid)
