"""From a job and its pods to what the planner knows of. Pure."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import islice
from typing import Any

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.api.status import QueueState, QueueStatus
from controller.api.text import plain
from controller.backends.cluster import evidence, kinds
from controller.backends.cluster.conditions import condition
from controller.backends.cluster.evidence import Evidence
from controller.plan.observed import JobState, ObservedJob, ObservedResult
from trainers.contract import FailureClass

Object = Mapping[str, Any]

MULTIKUEUE = "kueue.x-k8s.io/multikueue"
"""Carries jobs out in other clusters, and copies their status here; their pods are there."""
OF_KUBERNETES = ("foregroundDeletion", "orphan")
"""Finalizers by which it deletes what an object has made, or lets that be."""
PATIENCE_SECONDS = 30.0
"""For a pod to disappear after its grace is over."""
PODS_PATIENCE_SECONDS = 60.0
"""For a job's pods to be made, before they are looked for in another way."""
DIGEST = re.compile(r"[-0-9A-Za-z_.:]{1,128}", re.ASCII)
NAME_LIMIT = 256
MOST_METRICS = 256
"""Of one phase. A pod's last word has 4 KiB, in which a hundred find room."""
ELSEWHERE = "in another cluster (MultiKueue), where its pods are"
WITHOUT_RUNTIME = (
    "MultiKueue copies a TrainJob to another cluster without its TrainingRuntime, and it waits until somebody brings that; "
    "runs with backend PyTorchJob need none"
)
NO_QUEUE = (
    "Kueue holds every job here, also those without a queue (manageJobsWithoutQueueName), and this run names none: "
    "set spec.queueName, or have the admin set a queue for all (defaults.queue)"
)
QUEUE_PATIENCE_SECONDS = 15.0
"""For Kueue to notice a job; without one the queue's integration is off."""


def observed_job(job: Object, pods: Sequence[Object], queue: QueueStatus | None, now: datetime) -> ObservedJob:
    """One attempt, as its job and the job's pods tell."""
    meta_ = job["metadata"]
    base = ObservedJob(
        phase=meta_["labels"][meta.LABEL_PHASE],
        attempt=int(meta_["labels"][meta.LABEL_ATTEMPT]),
        # Never empty: a status leaves out what is empty, and an attempt without a digest could not be read again.
        digest=meta_.get("annotations", {}).get(meta.ANNOTATION_DIGEST) or "unknown",
        state=JobState.LIVE,
        name=meta_["name"],
        uid=meta_["uid"],
        started_at=_not_before(job, first_start(pods)),
        queue_name=meta_["labels"].get(meta.LABEL_QUEUE, ""),
        queue_asked=meta_.get("annotations", {}).get(meta.ANNOTATION_QUEUE, ""),
        queue=queue,
        leaving=meta_.get("deletionTimestamp") is not None,
        left="" if ended(job) == "Succeeded" else evidence.left(pods, now, PATIENCE_SECONDS),
        kept_by=kept_by(job),
        elsewhere=is_elsewhere(job),
    )
    if is_suspended(job) and not ended(job):
        return base if queue or base.elsewhere or is_queued(job) else _suspended(base, job, now)
    if base.elsewhere:
        return _elsewhere(base, job, now)
    return _with_end(base, job, pods, now) if ended(job) else _live(base, job, pods, now)


def leaving(run: AlignmentRun, pods: Mapping[tuple[str, int], Sequence[Object]], now: datetime) -> list[ObservedJob]:
    """Attempts whose job is gone and whose ``pods`` go on: as one whose job is on its way out."""
    attempts = [(phase.name, a) for phase in (run.status.phases if run.status else ()) for a in phase.attempts]
    return [
        ObservedJob(
            phase, a.number, a.digest, JobState.LIVE, name=a.job, leaving=True,
            left=evidence.left(pods[phase, a.number], now, PATIENCE_SECONDS),
        )
        for phase, a in attempts
        if (phase, a.number) in pods
    ]  # fmt: skip


def _with_end(base: ObservedJob, job: Object, pods: Sequence[Object], now: datetime) -> ObservedJob:
    finished = finished_at(job) or now
    if ended(job) == "Succeeded":
        return replace(base, state=JobState.SUCCEEDED, finished_at=finished)
    seen = evidence.find(pods)
    # While a pod is still saving its work, nobody else may write to the phase's directory.
    going_down = not all(evidence.has_ended(pod, now, PATIENCE_SECONDS) for pod in pods)
    state = JobState.LIVE if going_down else JobState.FAILED
    end = None if going_down else finished
    return replace(base, state=state, finished_at=end, guessed=seen is None, **_told(seen or _gone(job), job))


def _suspended(base: ObservedJob, job: Object, now: datetime) -> ObservedJob:
    """By somebody, and no queue will let it go. It waits as one whose pods find no place, since it was suspended.

    Kueue suspends jobs without a queue's label, too, where it is told to manage them, and makes their Workload afterwards.
    """
    made = evidence.timestamp(job["metadata"]["creationTimestamp"])
    if (now - made).total_seconds() < QUEUE_PATIENCE_SECONDS:
        return base
    told, kind = condition(job, "Suspended"), kinds.of_job(job)
    at = told.get("lastTransitionTime") if told.get("status") == "True" else None
    why = (
        f"its job is suspended, and not by a queue; it goes on when {kind.SUSPEND} of {kind.KIND} {base.name} is false"
    )
    return replace(base, message=why, may_start_since=max(made, evidence.timestamp(at)) if at else now)


def _elsewhere(base: ObservedJob, job: Object, now: datetime) -> ObservedJob:
    """By the job's own word alone. How long it takes to start is the other cluster's affair."""
    since = kinds.of_job(job).started_at(job)
    begun = replace(base, running_since=evidence.timestamp(since) if since else None, message=ELSEWHERE)
    end = ended(job)
    if end is None:
        return begun
    if end == "Succeeded":
        return replace(begun, state=JobState.SUCCEEDED, finished_at=finished_at(job) or now, message="")
    why = Evidence(FailureClass.INFRASTRUCTURE, f"failed {ELSEWHERE}: {condition(job, 'Failed').get('message', '')}")
    return replace(begun, state=JobState.FAILED, finished_at=finished_at(job) or now, **_told(why, job))


def _gone(job: Object) -> Evidence:
    """The pods took the reason with them; the planner may remember one from before."""
    return Evidence(FailureClass.INFRASTRUCTURE, f"its pods are gone: {condition(job, 'Failed').get('message', '')}")


def _live(base: ObservedJob, job: Object, pods: Sequence[Object], now: datetime) -> ObservedJob:
    if outlived(job, pods, now) and result_of(pods) is None:
        return replace(base, **_told(Evidence(FailureClass.INFRASTRUCTURE, "ended without leaving a result"), job))
    at_work = [pod for pod in pods if pod["status"].get("phase") != "Succeeded"]
    doomed = evidence.find(at_work) or evidence.hopeless(at_work)
    if doomed is not None:
        return replace(base, **_told(doomed, job))
    running, since = all_running_since(job, pods), running_since(job)
    placed = sum(bool(pod["spec"].get("nodeName")) for pod in pods)
    return replace(base, message=evidence.holdup(at_work), may_start_since=since, running_since=running, placed=placed)


def _told(found: Evidence, job: Object) -> dict[str, Any]:
    """If we have deleted the job ourselves the planner knows, and takes no other word."""
    why = "its job is being deleted; " if job["metadata"].get("deletionTimestamp") else ""
    return {"failure": found.failure, "message": f"{why}{found.message}", "node": found.node}


# ---------------------------------------------------------------- reading jobs


def ended(job: Object) -> str | None:
    """`Succeeded`, `Failed`, or None."""
    return kinds.of_job(job).ended(job)


def outlived(job: Object, pods: Sequence[Object], now: datetime) -> bool:
    """Whether all of the job has trained to its end and something else in its pods goes on, as a sidecar does.

    Then the job never ends by itself. Sidecars that leave with the main container have time for it.
    """
    ends = [evidence.container_state(pod, "terminated") for pod in pods]
    if (
        ended(job)
        or not ends
        or len(pods) < kinds.of_job(job).nodes(job)
        or any(end.get("exitCode") != 0 for end in ends)
    ):
        return False
    last = max((evidence.timestamp(end["finishedAt"]) for end in ends if end.get("finishedAt")), default=now)
    going = any(pod["status"].get("phase") == "Running" for pod in pods)
    return going and (now - last).total_seconds() > PATIENCE_SECONDS


def finished_at(job: Object) -> datetime | None:
    text = kinds.of_job(job).finished_at(job)
    return evidence.timestamp(text) if text else None


def is_suspended(job: Object) -> bool:
    """By Kueue, or by somebody: we never suspend a job."""
    return kinds.of_job(job).is_suspended(job)


def kept_by(job: Object) -> tuple[str, ...]:
    """Finalizers of somebody's that keep a deleted job."""
    found = job["metadata"] if job["metadata"].get("deletionTimestamp") else {}
    return tuple(name for name in found.get("finalizers") or () if name not in OF_KUBERNETES)


def is_elsewhere(job: Object) -> bool:
    return kinds.of_job(job).managed_by(job) == MULTIKUEUE


def is_leaving(job: Object, pods: Sequence[Object], now: datetime) -> bool:
    """Deleted, and only its object is left: a pod on a dead node may keep it for ever."""
    deleted = job["metadata"].get("deletionTimestamp") is not None
    return deleted and bool(pods) and all(evidence.has_ended(pod, now, PATIENCE_SECONDS) for pod in pods)


def lacks_pods(job: Object, pods: Sequence[Object], now: datetime) -> bool:
    """Whether some should have been there for a while. One that is on its way out has none to come."""
    if is_suspended(job) or is_elsewhere(job) or job["metadata"].get("deletionTimestamp") is not None:
        return False
    late = (now - running_since(job)).total_seconds() > PODS_PATIENCE_SECONDS
    return len(pods) < kinds.of_job(job).nodes(job) and (late or ended(job) is not None)


def is_alive(job: Object, pods: Sequence[Object], now: datetime) -> bool:
    """Whether a job that is not the run's has something that writes, or may yet have."""
    over = ended(job) is not None or is_leaving(job, pods, now)
    return not over or not all(evidence.has_ended(pod, now, PATIENCE_SECONDS) for pod in pods)


def running_since(job: Object) -> datetime:
    """Since when the job may have pods: its creation, or when its queue let it go."""
    made = evidence.timestamp(job["metadata"]["creationTimestamp"])
    started = kinds.of_job(job).started_at(job)
    return max(evidence.timestamp(started), made) if started else made


def _not_before(job: Object, moment: datetime | None) -> datetime | None:
    """Nothing of a job was before the job: nodes' clocks may be behind by hours."""
    return max(moment, evidence.timestamp(job["metadata"]["creationTimestamp"])) if moment is not None else None


def all_running_since(job: Object, pods: Sequence[Object]) -> datetime | None:
    """Since when every pod of the job has run; None while one is missing or has not begun.

    The pods of a job do not end in the same second: one that has succeeded has run.
    """
    wanted = kinds.of_job(job).nodes(job)
    states = [evidence.container_state(pod, "running") or evidence.container_state(pod, "terminated") for pod in pods]
    starts = [state.get("startedAt") for state in states]
    known = [evidence.timestamp(start) for start in starts if start]
    return _not_before(job, max(known)) if len(known) == len(pods) and len(pods) >= wanted else None


def first_start(pods: Sequence[Object]) -> datetime | None:
    starts = [
        evidence.container_state(pod, state).get("startedAt") for pod in pods for state in ("running", "terminated")
    ]
    return min((evidence.timestamp(start) for start in starts if start), default=None)


def warning(events: Sequence[Object], now: datetime) -> str:
    """The newest of some warning events, in one line. Whoever may write events may write these: none is of the future."""
    last = max(events, key=lambda event: (min(_told_at(event), now), event["metadata"]["creationTimestamp"]))
    return f"{last.get('reason', '')}: {last.get('message', '')}"


def _told_at(event: Object) -> datetime:
    return evidence.timestamp(
        event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"]
    )


# ---------------------------------------------------------------- results and queues


def result_of(pods: Iterable[Object]) -> ObservedResult | None:
    """What rank 0 said it left; a phase that misses its gates has left something too."""
    for pod in pods:
        said = evidence.termination(pod) if evidence.index(pod) == 0 else None
        if (
            said is not None
            and said.failure in (None, FailureClass.GATE_FAILED)
            and DIGEST.fullmatch(said.artifact_digest)
        ):
            return ObservedResult(said.digest, said.artifact_digest, _figures(said.metrics))
    return None


def result_from_elsewhere(job: ObservedJob) -> ObservedResult:
    """Its pods' last word is not heard, but a phase that has missed its gates fails. What it left is known by who has made it."""
    return ObservedResult(job.digest, f"elsewhere-{job.uid}")


def _figures(metrics: Mapping[str, float]) -> dict[str, float]:
    """JSON has no infinities, and a status with one could not be written; each name becomes a label of a series."""
    found = {plain(name, NAME_LIMIT): value for name, value in metrics.items() if math.isfinite(value)}
    return dict(islice(found.items(), MOST_METRICS))


def is_queued(job: Object) -> bool:
    return meta.LABEL_QUEUE in job["metadata"].get("labels", {})


def queue_status(job: Object, workload: Object | None, installed: bool, now: datetime) -> QueueStatus | None:
    """What Kueue says about a job; None in the first seconds, and of one that it has nothing to do with."""
    if workload is not None:
        found = _workload_status(workload).model_copy(update={"workload": workload["metadata"]["name"]})
        if found.state == QueueState.MISSING and not is_queued(job):
            return found.model_copy(update={"message": NO_QUEUE})
        alone = found.state == QueueState.QUOTA_RESERVED and is_elsewhere(job) and kinds.of_job(job).REFERS
        return found.model_copy(update={"message": f"{found.message}; {WITHOUT_RUNTIME}"}) if alone else found
    age = (now - evidence.timestamp(job["metadata"]["creationTimestamp"])).total_seconds()
    if not is_queued(job) or age < QUEUE_PATIENCE_SECONDS:
        return None
    return QueueStatus(state=QueueState.MISSING, message=_without_workload(job, installed))


def _without_workload(job: Object, installed: bool) -> str:
    labels = job["metadata"]["labels"]
    asked = f"queue {labels[meta.LABEL_QUEUE]} is asked for, but"
    if is_suspended(job):
        priority = labels.get(meta.LABEL_QUEUE_PRIORITY)
        cause = f"WorkloadPriorityClass {priority} does not exist, or " if priority else ""
        return f"{asked} Kueue makes no Workload for the job, which waits: {cause}it has a reason that its log tells"
    missing = (
        f"its integration {kinds.of_job(job).INTEGRATION} is switched off"
        if installed
        else "Kueue is not installed, or serves neither v1beta2 nor v1beta1 of its kinds"
    )
    return f"{asked} nothing queues the job: {missing}; it runs unqueued"


def _once(first: str, second: str) -> str:
    """Both, unless one has all words of the other, as "The LocalQueue is stopped" and "LocalQueue a is stopped"."""
    of_first, of_second = (set(words.lower().split()) - {"the"} for words in (first, second))
    if of_second <= of_first:
        return first
    return second if of_first <= of_second else f"{first}; {second}"


def _workload_status(workload: Object) -> QueueStatus:
    def holds(kind: str) -> Object | None:
        found = condition(workload, kind)
        return found if found.get("status") == "True" else None

    if (admitted := holds("Admitted")) is not None:
        return QueueStatus(state=QueueState.ADMITTED, message=admitted.get("message", ""))
    if (reserved := holds("QuotaReserved")) is not None:
        return QueueStatus(state=QueueState.QUOTA_RESERVED, message=reserved.get("message", ""))
    waiting = condition(workload, "QuotaReserved").get("message", "")
    if "doesn't exist" in waiting or "not found" in waiting:
        return QueueStatus(state=QueueState.MISSING, message=waiting)
    for kind, state in (("Preempted", QueueState.PREEMPTED), ("Evicted", QueueState.EVICTED)):
        if (found := holds(kind)) is not None:
            return QueueStatus(state=state, message=_once(found.get("message", ""), waiting))
    return QueueStatus(state=QueueState.PENDING, message=waiting or "waits for quota")
