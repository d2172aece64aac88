"""`alignctl status` of a run in a cluster."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime

from controller.api.status import RunStatus
from controller.commands.cluster.client import Cluster
from controller.commands.cluster.errors import ClusterError
from controller.commands.cluster.patience import patiently
from controller.commands.cluster.run import ClusterRun, newest
from controller.commands.status import ending, follow_status, headline, print_status
from controller.commands.where import Place
from controller.plan.verdict import duration

POLL_SECONDS = 2.0


def cluster_status(place: Place, name: str | None, watch: bool) -> int:
    cluster = Cluster(place)
    run = newest(patiently(cluster, cluster.runs, known=False), name, cluster.namespace)
    if watch:
        follow_status(_frames(cluster, run.name))
        run = existing(cluster, run.name)
    print_status(title(run, cluster.namespace), run.status)
    return ending(run.status) if watch else 0


def title(run: ClusterRun, namespace: str) -> str:
    name = f"{run.name} in {namespace}"
    if not run.status.conditions:
        age = duration((datetime.now(UTC) - run.created).total_seconds())
        return f"run {name}: {run.state} (created {age} ago; is the operator running?)"
    return headline(name, run.state, run.status, counting=not run.stopped)


def existing(cluster: Cluster, name: str) -> ClusterRun:
    run = patiently(cluster, lambda: cluster.run(name))
    if run is None:
        raise ClusterError(f"run {name} was deleted")
    return run


def _frames(cluster: Cluster, name: str) -> Iterator[RunStatus]:
    while True:
        run = existing(cluster, name)
        yield run.status
        if run.ended:
            return
        time.sleep(POLL_SECONDS)
