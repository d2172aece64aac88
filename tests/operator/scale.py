"""Many runs at once on fake nodes, and what the operator spends on them, beside a kopf that does nothing."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from cluster.client import Cluster
from driver import MODEL, ROOT, OperatorProcess, dpo, manifest, sample, sft
from ends import Ends, share, watched_ends

from controller.api.run import AlignmentRun
from controller.plan.resolve import resolve
from trainers.contract import phase_digest

BATCH = 100
PREFIX = "alignment_operator_"


@dataclass(frozen=True)
class Figures:
    runs: int
    phases: int
    """Of each run."""
    jobs: int
    seconds: float
    """From the first apply to the last run's end."""
    gaps: list[float]
    """Seconds from a job's end to the next one's creation."""
    status_writes: float
    """Per phase."""
    reads: float
    """Per phase."""
    look_ms: float
    wait_ms: float
    cpu_seconds: float
    rss_mb: float
    beside: str
    """What others have spent on the same jobs."""

    def __str__(self) -> str:
        return (
            f"{self.runs} runs of {self.phases} phases, {self.jobs} jobs: {self.seconds:.0f} s; "
            f"from a job's end to the next one's creation {1000 * share(self.gaps, 0.5):.0f} ms, "
            f"of a hundred 99 within {1000 * share(self.gaps, 0.99):.0f} ms; "
            f"a phase: {self.status_writes:.1f} status writes, {self.reads:.1f} reads, "
            f"{1000 * self.cpu_seconds / self.jobs:.1f} ms of CPU; "
            f"a look takes {self.look_ms:.1f} ms after {self.wait_ms:.0f} ms in the queue; "
            f"operator: {self.cpu_seconds:.1f} CPU-s, {self.rss_mb:.0f} MB{self.beside}"
        )


def scripted(name: str, phases: int = 2) -> dict[str, Any]:
    """A run whose phases follow one another, and whose pods end with the words of phases that have succeeded."""
    names = ["sft", *(f"dpo{i}" if i else "dpo" for i in range(phases - 1))]
    entries = [sft(), *(dpo(after, on) for on, after in pairwise(names))]
    run = manifest(name, *entries)
    parsed = AlignmentRun.model_validate({**run, "spec": {**run["spec"], "model": MODEL}})
    known: dict[str, str] = {}
    for phase, entry in zip(resolve(parsed), run["spec"]["phases"], strict=True):
        digest = phase_digest(phase.type.name, phase.spec, phase.image, {i: known[i] for i in phase.inputs})
        known[phase.name] = f"artifact-of-{phase.name}"
        said = {"digest": digest, "artifactDigest": known[phase.name], "metrics": {"loss": 1.0}}
        entry["template"] = {"env": [{"name": "TEST_POD_MESSAGE", "value": json.dumps(said)}]}
    return run


def run_many(
    cluster: Cluster, operator: OperatorProcess, namespace: str, count: int, phases: int = 2, timeout: float = 300,
    beside: Path | None = None,
) -> Figures:  # fmt: skip
    """Apply so many runs and wait for all to succeed; with a kopf that does nothing ``beside``, which leaves its notes there."""
    assert operator.process is not None
    process, training = psutil.Process(operator.process.pid), training_operator(cluster)
    with watched_ends(cluster, namespace) as ends, bare_kopf(operator.kubeconfig, beside) as told:
        before, cpu, its_cpu = counters(operator), _cpu(process), _cpu(training)
        started = time.monotonic()
        apply(cluster, [scripted(f"run-{i}", phases) for i in range(count)], namespace)
        cluster.wait(lambda: _succeeded(cluster, namespace) == count, timeout, f"{count} runs succeed", every=1.0)
        seconds = time.monotonic() - started
        cpu_seconds = _cpu(process) - cpu
        spent = {name: after - before[name] for name, after in counters(operator).items()}
        return Figures(
            runs=count,
            phases=phases,
            jobs=len(ends.ended),
            seconds=seconds,
            gaps=ends.gaps(),
            status_writes=spent["writes"] / count / phases,
            reads=spent["reads"] / count / phases,
            look_ms=1000 * spent["look_seconds"] / spent["looks"],
            wait_ms=1000 * spent["wait_seconds"] / spent["looks"],
            cpu_seconds=cpu_seconds,
            rss_mb=_megabytes(process),
            beside=f"; Training Operator: {_cpu(training) - its_cpu:.1f} CPU-s, {_megabytes(training):.0f} MB{told(ends)}",
        )


def apply(cluster: Cluster, documents: list[dict[str, Any]], namespace: str) -> None:
    for first in range(0, len(documents), BATCH):  # one call of kubectl has a minute
        cluster.apply(documents[first : first + BATCH], namespace)


@contextmanager
def bare_kopf(kubeconfig: Path, notes: Path | None) -> Iterator[Callable[[Ends], str]]:
    """A bare kopf. Yields what tells, at the end, what it has cost."""
    if notes is None:
        yield lambda ends: ""
        return
    command = [sys.executable, str(Path(__file__).with_name("bare_kopf.py")), str(kubeconfig), str(notes)]
    with notes.with_suffix(".log").open("wb") as log:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        running = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": paths})
    process = psutil.Process(running.pid)

    def told(ends: Ends) -> str:
        times = [line.split() for line in notes.read_text().splitlines()]
        lags = [float(at) - ends.ended[name] for name, at in times if name in ends.ended]
        return (
            f"; a bare kopf: told of an end after {1000 * share(lags, 0.5):.0f} ms, of a hundred 99 within "
            f"{1000 * share(lags, 0.99):.0f} ms; {_cpu(process):.1f} CPU-s, "
            f"{_megabytes(process):.0f} MB"
        )

    try:
        yield told
    finally:
        running.kill()
        running.wait()


def training_operator(cluster: Cluster) -> psutil.Process:
    """Kubeflow's, of this cluster."""
    mine = str(cluster.kubeconfig)
    return next(
        one
        for one in psutil.process_iter(["name", "cmdline"])
        if one.info["name"].startswith("training-operat") and any(mine in part for part in one.info["cmdline"])
    )


def _cpu(process: psutil.Process) -> float:
    return float(sum(process.cpu_times()[:2]))


def _megabytes(process: psutil.Process) -> float:
    return float(process.memory_info().rss / 2**20)


def counters(operator: OperatorProcess) -> dict[str, float]:
    """Calls to the API server with their outcomes, and looks. Of one page: of a thousand runs it takes half a second to write."""
    _, page = operator.get("metrics")
    calls = f"{PREFIX}api_requests_total"
    asked = [sample(page, calls, verb=verb) for verb in ("get", "list")]
    return {
        "writes": sample(page, calls, resource="alignmentruns/status", code="200"),
        "reads": sum(asked) - sample(page, calls, resource="leases", verb="get"),
        "looks": sample(page, f"{PREFIX}reconcile_seconds_count"),
        "look_seconds": sample(page, f"{PREFIX}reconcile_seconds_sum"),
        "wait_seconds": sample(page, f"{PREFIX}workqueue_wait_seconds_sum"),
    }


def _succeeded(cluster: Cluster, namespace: str) -> int:
    table = cluster.kubectl("get", "arun", "-n", namespace, "--no-headers")
    return sum(" Succeeded " in line for line in table.splitlines())
