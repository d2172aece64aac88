"""What there is of a run, by whose it is: its own jobs and pods, what has their names, what writes to its folders."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.backends.cluster import evidence, kinds, observe, ownership
from controller.backends.cluster.kind import JobKind
from controller.backends.cluster.orphans import Orphans
from controller.backends.cluster.ownership import Attempted, Object
from controller.backends.cluster.references import controller_of, group_of
from controller.memory import Memory, Reads


@dataclass(frozen=True)
class Belongings:
    jobs: list[Object]
    """The run's own."""
    pods: dict[str, list[Object]]
    """By the name of their job, in their order."""
    between: dict[str, list[Object]]
    """By the name of the job, what it has made beside its pods."""
    unlabelled: dict[str, tuple[str, ...]]
    """By the name of the job, what of it has lost our labels, by which watches tell of it."""
    leaving: dict[Attempted, list[Object]]
    """Of attempts that were asked to end and whose job is gone, the pods that go on."""
    taken: dict[Attempted, str]
    """Whose the objects are that have the names of the run's jobs."""
    held: dict[str, str]
    """By phase, what an earlier run has left that may still write to its folder."""


async def gather(
    source: Reads, memory: Memory, kind: JobKind, run: AlignmentRun, orphans: Orphans, now: datetime
) -> Belongings:
    """``memory``: what there is of other kinds than the run's, which an earlier one of its name may have left."""
    namespace = run.metadata.namespace or "default"
    labels = {meta.LABEL_MANAGED_BY: meta.PRODUCT, meta.LABEL_RUN: run.name}
    listed, between = await _listed(source, kind, namespace, labels)
    known = ownership.names(run)
    own = [found for job in listed if ownership.belongs(job, run) if (found := ownership.identified(job, known))]
    others = [job for job in listed if not ownership.belongs(job, run)]
    for another in kinds.KINDS.values():
        if another is not kind:
            jobs_of_it, between_of_it = await _listed(memory, another, namespace, labels)
            others, between = [*others, *jobs_of_it], [*between, *between_of_it]
    unlabelled, taken = await _by_name(source, kind, run, own)
    jobs = [*own, *unlabelled]
    ordered = sorted(await source.list_pods(namespace, labels), key=evidence.index)
    pods, left = ownership.by_job(ordered, [*jobs, *others], between)
    strays = {name: found async for name, found in _strays(source, kind, run, jobs, pods, now)}
    pods |= {name: sorted([*pods.get(name, ()), *found], key=evidence.index) for name, found in strays.items()}
    without_job = await _without_job(source, namespace, left)
    leaving, held = _writers(run, orphans.that_may_write(run, without_job, now))
    held |= _held(run, others, pods, now)
    made = ownership.made_by(jobs, between)
    return Belongings(jobs, pods, made, _told(unlabelled, strays), leaving, taken, held)


def _told(jobs: Sequence[Object], strays: Mapping[str, Sequence[Object]]) -> dict[str, tuple[str, ...]]:
    found = {name: [*map(_lost, pods)] for name, pods in strays.items()}
    for job in jobs:
        found.setdefault(job["metadata"]["name"], []).insert(0, f"{job['kind']} {job['metadata']['name']}")
    return {name: tuple(things) for name, things in found.items()}


def _writers(run: AlignmentRun, pods: Sequence[Object]) -> tuple[dict[Attempted, list[Object]], dict[str, str]]:
    """Pods without a job that go on: by the attempt that we ended which they are of, and those of none, by phase."""
    stopping = ownership.stopping(run)
    leaving: dict[Attempted, list[Object]] = {}
    others: list[Object] = []
    for pod in pods:
        which = ownership.attempt_of(pod, stopping)
        (others if which is None else leaving.setdefault(which, [])).append(pod)
    return leaving, {
        ownership.phase_of(pod): _with(ownership.told(pod, "Pod"), "which", evidence.until(pod)) for pod in others
    }


async def _listed(
    source: Reads, kind: JobKind, namespace: str, labels: Mapping[str, str]
) -> tuple[list[Object], list[Object]]:
    """Jobs, and what is between them and their pods."""
    of_each = [await source.list_jobs(resource, namespace, labels) for resource in kind.MAKERS.values()]
    return of_each[0], [thing for things in of_each[1:] for thing in things]


async def _by_name(
    source: Reads, kind: JobKind, run: AlignmentRun, own: Sequence[Object]
) -> tuple[list[Object], dict[Attempted, str]]:
    """Jobs of attempts that should be there and do not have our labels: the run's without them, and somebody else's."""
    namespace, there = run.metadata.namespace or "default", {job["metadata"]["name"] for job in own}
    found: list[Object] = []
    taken: dict[Attempted, str] = {}
    for which, name in ownership.going(run).items():
        job = await source.get_job(kind.RESOURCE, namespace, name) if name not in there else None
        if job is not None and not ownership.belongs(job, run):
            taken[which] = ownership.told(job)
        elif job is not None and (again := ownership.identified(job, {name: which})) is not None:
            found.append(again)
    return found, taken


def _lost(pod: Object) -> str:
    """It, or what is between it and its job."""
    name = f"Pod {pod['metadata']['name']}"
    return f"what has made {name}" if meta.LABEL_RUN in (pod["metadata"].get("labels") or {}) else name


async def _strays(
    source: Reads, kind: JobKind, run: AlignmentRun, jobs: Sequence[Object], pods: Mapping[str, Sequence[Object]], now: datetime
) -> AsyncIterator[tuple[str, list[Object]]]:  # fmt: skip
    """Pods without our labels, by the name of their job: looked for as its controller does, where some are missing."""
    namespace, going = run.metadata.namespace or "default", set(ownership.going(run).values())
    for job in jobs:
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        there = pods.get(name, ())
        if name not in going or not observe.lacks_pods(job, there, now):
            continue
        known = {pod["metadata"]["uid"] for pod in there}
        others = [p for p in await source.list_made(namespace, {kind.PODS: name}) if p["metadata"]["uid"] not in known]
        if found := [pod for pod in others if await _job_of(source, namespace, controller_of(pod)) == uid]:
            yield name, found


async def _without_job(source: Reads, namespace: str, pods: Sequence[Object]) -> list[Object]:
    """Those whose job is gone; with labels like ours, a job of somebody else's may have pods, too."""
    makers = {owner["uid"]: owner for pod in pods if (owner := controller_of(pod))}
    gone = {uid for uid, owner in makers.items() if await _job_of(source, namespace, owner) is None}
    return [pod for pod in pods if controller_of(pod)["uid"] in gone]


async def _job_of(source: Reads, namespace: str, owner: Object) -> str | None:
    """UID of the job from which a pod comes by what controls it; None if any of that is gone.

    No further than there are kinds of things, since anybody may write a circle.
    """
    top: str | None = None
    for _ in kinds.MAKERS:
        resource = kinds.MAKERS.get((group_of(owner), owner.get("kind", "")))
        if resource is None:
            break
        thing = await source.get_job(resource, namespace, owner["name"])
        if thing is None or thing["metadata"]["uid"] != owner["uid"]:
            return None
        top, owner = owner["uid"], controller_of(thing)
    return top


def _held(
    run: AlignmentRun, others: Sequence[Object], pods: Mapping[str, Sequence[Object]], now: datetime
) -> dict[str, str]:
    """Jobs of an earlier run that may still write."""
    jobs = [job for job in others if ownership.is_of_earlier_run(job, run)]
    alive = [job for job in jobs if observe.is_alive(job, pods.get(job["metadata"]["name"], ()), now)]
    leaving = {name: [pod for pod in found if evidence.until(pod)] for name, found in pods.items()}
    left = {name: evidence.left(found, now, observe.PATIENCE_SECONDS) for name, found in leaving.items()}
    return {
        ownership.phase_of(job): _with(ownership.told(job), "whose", left.get(job["metadata"]["name"], ""))
        for job in alive
    }


def _with(owner: str, joint: str, left: str) -> str:
    """Whoever is waited for, with what is known of how long it may take."""
    return f"{owner}, {joint} {left}," if left else owner
