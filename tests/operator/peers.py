"""The operator beside a kopf that does nothing and the Training Operator: what each spends on the same runs at the same time."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from cluster.client import Cluster
from driver import ROOT, OperatorProcess
from ends import Ends, share

OPERATOR, KOPF, TRAINING_OPERATOR = "operator", "a kopf that does nothing", "Training Operator"
READS, WRITES = ("get", "list"), ("create", "update", "patch", "delete", "deletecollection")


@dataclass(frozen=True)
class Spent:
    cpu_seconds: float
    rss_mb: float
    reads: int
    writes: int
    """Without events and Leases."""
    events: int


@contextmanager
def kopf_beside(kubeconfig: Path, notes: Path | None) -> Iterator[psutil.Process | None]:
    """It notes there what it is told of."""
    if notes is None:
        yield None
        return
    command = [sys.executable, str(Path(__file__).with_name("bare_kopf.py")), str(kubeconfig), str(notes)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with notes.with_suffix(".log").open("wb") as log:
        running = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": paths})
    try:
        yield psutil.Process(running.pid)
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


class Watch:
    """From now on."""

    def __init__(self, cluster: Cluster, operator: OperatorProcess, kopf: psutil.Process | None) -> None:
        assert operator.process is not None
        self.cluster = cluster
        self.processes = {OPERATOR: psutil.Process(operator.process.pid), TRAINING_OPERATOR: training_operator(cluster)}
        self.processes |= {KOPF: kopf} if kopf else {}
        self._cpu = {name: cpu(process) for name, process in self.processes.items()}
        self._since = datetime.now(UTC)

    def spent(self) -> dict[str, Spent]:
        asked = calls(self.cluster, self._since)
        found = {}
        for name, process in self.processes.items():
            mine: Mapping[str, int] = asked.get(name, {})
            used = cpu(process) - self._cpu[name]
            found[name] = Spent(
                used, megabytes(process), mine.get("read", 0), mine.get("write", 0), mine.get("event", 0)
            )
        return found


def calls(cluster: Cluster, since: datetime) -> dict[str, Counter[str]]:
    """Of whom the API server's audit log tells, what they have asked for. Who only watches is not among them."""
    assert cluster.audit_log is not None
    begin, found = f"{since:%Y-%m-%dT%H:%M:%S.%f}", {name: Counter[str]() for name in (OPERATOR, TRAINING_OPERATOR)}
    for file in sorted(cluster.audit_log.parent.glob("audit*.log")):
        if file.stat().st_mtime < since.timestamp():
            continue
        with file.open() as lines:
            for line in lines:
                event = json.loads(line)
                who, what = caller(event), kind_of(event)
                if who and what and event["requestReceivedTimestamp"] >= begin:
                    found[who][what] += 1
    return found


def caller(event: Mapping[str, Any]) -> str | None:
    agent = event.get("userAgent", "")
    if agent.startswith("training-operator"):
        return TRAINING_OPERATOR
    # What kopf asks for itself are its first lists.
    is_ours = event["user"]["username"].endswith(":alignment-operator") and not agent.startswith("kopf")
    return OPERATOR if is_ours else None


def kind_of(event: Mapping[str, Any]) -> str | None:
    resource, verb = event.get("objectRef", {}).get("resource"), event["verb"]
    if resource == "leases":
        return None
    if resource == "events" and verb in WRITES:
        return "event"
    return "read" if verb in READS else "write" if verb in WRITES else None


def told_of_ends(notes: Path, ends: Ends) -> list[float]:
    """Seconds from a job's end until the kopf that does nothing was told of it."""
    times = [line.split() for line in notes.read_text().splitlines() if not line.startswith("runs ")]
    return [float(at) - ends.ended[name] for name, at in times if name in ends.ended]


def table(spent: Mapping[str, Spent], per: int, unit: str, lags: Mapping[str, Sequence[float]]) -> str:
    """``per`` so many of what is called ``unit``; ``lags``: seconds after a job's end."""
    rows: list[tuple[str, Callable[[str], str]]] = [
        ("after a job's end (Training Operator: a pod's), half within", lambda name: milliseconds(lags.get(name), 0.5)),
        ("after a job's end, 99 of a hundred within", lambda name: milliseconds(lags.get(name), 0.99)),
        ("CPU-s", lambda name: f"{spent[name].cpu_seconds:.1f}"),
        (f"ms of CPU a {unit}", lambda name: f"{1000 * spent[name].cpu_seconds / per:.1f}"),
        (f"reads a {unit}", lambda name: f"{spent[name].reads / per:.2f}"),
        (f"writes a {unit}", lambda name: f"{spent[name].writes / per:.2f}"),
        (f"events a {unit}", lambda name: f"{spent[name].events / per:.2f}"),
        ("MB", lambda name: f"{spent[name].rss_mb:.0f}"),
    ]
    names = [name for name in (OPERATOR, KOPF, TRAINING_OPERATOR) if name in spent]
    return aligned([("", *names), *((title, *map(cell, names)) for title, cell in rows)])


def milliseconds(values: Sequence[float] | None, part: float) -> str:
    return f"{1000 * share(list(values), part):.0f} ms" if values else "-"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join((cell.ljust if column == 0 else cell.rjust)(widths[column]) for column, cell in enumerate(row))
        for row in rows
    )


def cpu(process: psutil.Process) -> float:
    return float(sum(process.cpu_times()[:2]))


def megabytes(process: psutil.Process) -> float:
    return float(process.memory_info().rss / 2**20)
