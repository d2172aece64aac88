"""What there is of a run, by whose it is: its own jobs and pods, what has their names, what writes to its folders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.backends.cluster import evidence, observe, ownership
from controller.backends.cluster.kind import JobKind
from controller.backends.cluster.ownership import Attempted, Object
from controller.backends.cluster.references import controller_of
from controller.memory import Reads


@dataclass(frozen=True)
class Belongings:
    jobs: list[Object]
    """The run's own."""
    pods: dict[str, list[Object]]
    """By the name of their job, in their order."""
    taken: dict[Attempted, str]
    """Whose the objects are that have the names of the run's jobs."""
    held: dict[str, str]
    """By phase, what an earlier run has left that may still write to its folder."""


async def gather(source: Reads, kind: JobKind, run: AlignmentRun, now: datetime) -> Belongings:
    namespace = run.metadata.namespace or "default"
    labels = {meta.LABEL_MANAGED_BY: meta.PRODUCT, meta.LABEL_RUN: run.name}
    listed, known = await source.list_jobs(kind.RESOURCE, namespace, labels), ownership.names(run)
    own = [found for job in listed if ownership.is_ours(job, run) if (found := ownership.identified(job, known))]
    others = [job for job in listed if not ownership.is_ours(job, run)]
    unlabelled, taken = await _by_name(source, kind, run, own)
    jobs = [*own, *unlabelled]
    ordered = sorted(await source.list_pods(namespace, labels), key=evidence.index)
    pods, left = ownership.by_job(ordered, [*jobs, *others])
    writing = _still_writing(await _without_job(source, kind, namespace, left), now)
    return Belongings(jobs, pods, taken, writing | _held(run, others, pods, now))


async def _by_name(
    source: Reads, kind: JobKind, run: AlignmentRun, own: Sequence[Object]
) -> tuple[list[Object], dict[Attempted, str]]:
    """Jobs of attempts that should be there and do not have our labels: the run's without them, and somebody else's."""
    namespace, there = run.metadata.namespace or "default", {job["metadata"]["name"] for job in own}
    found: list[Object] = []
    taken: dict[Attempted, str] = {}
    for which, name in ownership.going(run).items():
        job = await source.get_job(kind.RESOURCE, namespace, name) if name not in there else None
        if job is not None and not ownership.is_ours(job, run):
            taken[which] = ownership.told(job)
        elif job is not None and (again := ownership.identified(job, {name: which})) is not None:
            found.append(again)
    return found, taken


async def _without_job(source: Reads, kind: JobKind, namespace: str, pods: Sequence[Object]) -> list[Object]:
    """Those whose job is gone; with labels like ours, a job of somebody else's may have pods, too."""
    names = {controller_of(pod)["name"] for pod in pods}
    there = [job for name in names if (job := await source.get_job(kind.RESOURCE, namespace, name)) is not None]
    uids = {job["metadata"]["uid"] for job in there}
    return [pod for pod in pods if controller_of(pod)["uid"] not in uids]


def _held(
    run: AlignmentRun, others: Sequence[Object], pods: Mapping[str, Sequence[Object]], now: datetime
) -> dict[str, str]:
    """Jobs of an earlier run that may still write."""
    jobs = [job for job in others if ownership.is_of_earlier_run(job, run)]
    alive = [job for job in jobs if observe.is_alive(job, pods.get(job["metadata"]["name"], ()), now)]
    return {ownership.phase_of(job): ownership.told(job) for job in alive}


def _still_writing(pods: Sequence[Object], now: datetime) -> dict[str, str]:
    """Pods that go on after their job."""
    writing = [pod for pod in pods if not evidence.has_ended(pod, now, observe.PATIENCE_SECONDS)]
    return {ownership.phase_of(pod): ownership.told(pod, "Pod") for pod in writing}
