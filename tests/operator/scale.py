"""Many runs at once on fake nodes, and what the operator spends on them, beside a kopf that does nothing."""

import json
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import peers
from cluster.client import Cluster
from driver import MODEL, OperatorProcess, dpo, manifest, sample, sft
from ends import watched_ends

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
    beside: str
    """What the operator and others have spent on the same jobs."""

    def __str__(self) -> str:
        return (
            f"{self.runs} runs of {self.phases} phases, {self.jobs} jobs: {self.seconds:.0f} s, "
            f"{self.jobs / self.seconds:.1f} phases a second; {self.status_writes:.1f} status writes a phase; "
            f"a look takes {self.look_ms:.1f} ms after {self.wait_ms:.0f} ms in the queue\n{self.beside}"
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
    notes: Path | None = None,
) -> Figures:  # fmt: skip
    """Apply so many runs and wait for all to succeed; with a kopf that does nothing beside, which leaves its ``notes`` there."""
    with watched_ends(cluster, namespace) as ends, peers.kopf_beside(operator.kubeconfig, notes) as kopf:
        watch, before, started = peers.Watch(cluster, operator, kopf), counters(operator), time.monotonic()
        apply(cluster, [scripted(f"run-{i}", phases) for i in range(count)], namespace)
        jobs = count * phases
        # To ask for all runs costs the API server more than to run some of them.
        cluster.wait(lambda: len(ends.ended) >= jobs, timeout, f"{jobs} jobs end", every=1.0)
        cluster.wait(lambda: _succeeded(cluster, namespace) == count, 300, f"{count} runs succeed", every=1.0)
        seconds = time.monotonic() - started
        used = {name: after - before[name] for name, after in counters(operator).items()}
        lags = {peers.OPERATOR: ends.gaps()} | ({peers.KOPF: peers.told_of_ends(notes, ends)} if notes else {})
        return Figures(
            runs=count,
            phases=phases,
            jobs=len(ends.ended),
            seconds=seconds,
            gaps=ends.gaps(),
            status_writes=used["writes"] / count / phases,
            reads=used["reads"] / count / phases,
            look_ms=1000 * used["look_seconds"] / used["looks"],
            wait_ms=1000 * used["wait_seconds"] / used["looks"],
            beside=peers.table(watch.spent(), count * phases, "phase", lags),
        )


def apply(cluster: Cluster, documents: list[dict[str, Any]], namespace: str) -> None:
    for first in range(0, len(documents), BATCH):  # one call of kubectl has a minute
        cluster.apply(documents[first : first + BATCH], namespace)


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
