"""Many runs at once on fake nodes, and what the operator spends on them."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
from cluster.client import Cluster
from driver import MODEL, OperatorProcess, dpo, manifest, sft

from controller.api.run import AlignmentRun
from controller.plan.resolve import resolve
from trainers.contract import phase_digest

BATCH = 100


@dataclass(frozen=True)
class Figures:
    runs: int
    jobs: int
    seconds: float
    """From the first apply to the last run's end."""
    status_writes_per_run: float
    reads_per_run: float
    reconcile_mean_ms: float
    queue_wait_mean_ms: float
    cpu_seconds: float
    rss_mb: float

    def __str__(self) -> str:
        return (
            f"{self.runs} runs of two phases, {self.jobs} jobs: {self.seconds:.0f} s; "
            f"{self.status_writes_per_run:.1f} status writes and {self.reads_per_run:.1f} reads a run; "
            f"a look takes {self.reconcile_mean_ms:.0f} ms after {self.queue_wait_mean_ms:.0f} ms in the queue; "
            f"operator: {self.cpu_seconds:.1f} CPU-s, {self.rss_mb:.0f} MB"
        )


def scripted(name: str) -> dict[str, Any]:
    """A run whose pods end with the words of phases that have succeeded."""
    run = manifest(name, sft(), dpo())
    parsed = AlignmentRun.model_validate({**run, "spec": {**run["spec"], "model": MODEL}})
    known: dict[str, str] = {}
    for phase, entry in zip(resolve(parsed), run["spec"]["phases"], strict=True):
        digest = phase_digest(phase.type.name, phase.spec, phase.image, {i: known[i] for i in phase.inputs})
        known[phase.name] = f"artifact-of-{phase.name}"
        said = {"digest": digest, "artifactDigest": known[phase.name], "metrics": {"loss": 1.0}}
        entry["template"] = {"env": [{"name": "TEST_POD_MESSAGE", "value": json.dumps(said)}]}
    return run


def run_many(cluster: Cluster, operator: OperatorProcess, namespace: str, count: int, timeout: float = 300) -> Figures:
    """Apply so many runs and wait for all to succeed."""
    assert operator.process is not None
    process = psutil.Process(operator.process.pid)
    cpu, before = sum(process.cpu_times()[:2]), _counters(operator)
    started = time.monotonic()
    runs = [scripted(f"run-{i}") for i in range(count)]
    for first in range(0, count, BATCH):  # one call of kubectl has a minute
        cluster.apply(runs[first : first + BATCH], namespace)
    cluster.wait(lambda: _succeeded(cluster, namespace) == count, timeout, f"{count} runs succeed", every=1.0)
    seconds = time.monotonic() - started
    spent = {name: after - before[name] for name, after in _counters(operator).items()}
    return Figures(
        runs=count,
        jobs=len(cluster.items("pytorchjobs", "-n", namespace)),
        seconds=seconds,
        status_writes_per_run=spent["writes"] / count,
        reads_per_run=spent["reads"] / count,
        reconcile_mean_ms=1000 * spent["look_seconds"] / spent["looks"],
        queue_wait_mean_ms=1000 * spent["wait_seconds"] / spent["looks"],
        cpu_seconds=sum(process.cpu_times()[:2]) - cpu,
        rss_mb=process.memory_info().rss / 2**20,
    )


def _counters(operator: OperatorProcess) -> dict[str, float]:
    prefix = "alignment_operator_"
    read: Callable[[str], float] = operator.metric
    return {
        "writes": read(f'{prefix}api_requests_total{{code="200",resource="alignmentruns/status",verb="update"}}'),
        "reads": sum(
            read(f'{prefix}api_requests_total{{code="200",resource="{resource}",verb="{verb}"}}')
            for resource, verb in (("alignmentruns", "get"), ("pytorchjobs", "list"), ("pods", "list"))
        ),
        "looks": read(f"{prefix}reconcile_seconds_count"),
        "look_seconds": read(f"{prefix}reconcile_seconds_sum"),
        "wait_seconds": read(f"{prefix}queue_wait_seconds_sum"),
    }


def _succeeded(cluster: Cluster, namespace: str) -> int:
    table = cluster.kubectl("get", "arun", "-n", namespace, "--no-headers")
    return sum(" Succeeded " in line for line in table.splitlines())
