"""What Kueue says of a run's jobs, in the Workloads that it makes for them.

A Workload is looked for once, by a label of its job's UID, and then asked for by its name, which the status keeps. A list by
label goes through all of the namespace: with nine thousand jobs in line each took 0.2 s of the API server's time.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from controller.api.run import AlignmentRun
from controller.api.status import QueueState, QueueStatus
from controller.backends.cluster import observe, ownership
from controller.backends.cluster.rights import Rights
from controller.kube.answers import ApiError
from controller.kube.api import Api

Object = dict[str, Any]

WORKLOAD_JOB_LABEL = "kueue.x-k8s.io/job-uid"


async def words(
    api: Api, rights: Rights, run: AlignmentRun, jobs: Sequence[Object], anew: bool, asks: bool, now: datetime
) -> dict[str, QueueStatus]:
    """By name. Believed is what was said unless ``anew``: of those that were let go, of those that wait unless it ``asks``."""
    told, namespace = _told(run), run.metadata.namespace or "default"
    found: dict[str, QueueStatus] = {}
    for job in jobs:
        name = job["metadata"]["name"]
        said = told.get(name)
        if said is not None and not anew and _still_holds(said, job, asks):
            found[name] = said
        elif (observe.is_queued(job) or observe.is_suspended(job)) and not observe.ended(job):
            status = await _asked(api, rights, namespace, job, said, now)
            if status is not None:
                found[name] = status
    return found


def _told(run: AlignmentRun) -> Mapping[str, QueueStatus]:
    phases = [phase for phase in (run.status.phases if run.status else ()) if phase.attempts]
    return {
        phase.attempts[-1].job: phase.queue for phase in phases if phase.queue is not None and phase.attempts[-1].job
    }


def _still_holds(said: QueueStatus, job: Object, asks: bool) -> bool:
    """A queue suspends jobs that it had let go before it says anything else."""
    admitted = said.state == QueueState.ADMITTED
    return admitted != observe.is_suspended(job) and (admitted or not asks)


async def _asked(
    api: Api, rights: Rights, namespace: str, job: Object, said: QueueStatus | None, now: datetime
) -> QueueStatus | None:
    workload = await _named(api, rights, namespace, said.workload) if said is not None and said.workload else None
    if workload is not None and ownership.is_of_job(workload, job):
        return observe.queue_status(job, workload, True, now)
    try:
        found = await api.list_workloads(namespace, {WORKLOAD_JOB_LABEL: job["metadata"]["uid"]})
    except ApiError as error:
        if not rights.lacks(error, "runs do not say what they wait for in a queue"):
            raise
        return said
    workload = next((w for w in found or () if ownership.is_of_job(w, job)), None)
    return observe.queue_status(job, workload, found is not None, now)


async def _named(api: Api, rights: Rights, namespace: str, name: str) -> Object | None:
    try:
        return await api.get_workload(namespace, name)
    except ApiError as error:
        if not rights.lacks(error, "Workloads are listed for each job that waits, which costs the API server more"):
            raise
        return None
