"""Whose an object is. Its name and labels say what anybody may write; only its controller, by kind and UID, says whose it is."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.api.status import AttemptState
from controller.api.text import plain
from controller.backends.cluster import kinds
from controller.backends.cluster.references import controller_of, group_of, reference
from controller.plan.job import job_name

Object = dict[str, Any]
Attempted = tuple[str, int]
"""A phase's name and an attempt's number."""

WORD_LIMIT = 100
"""Characters that are shown of what a stranger has named."""


def is_controlled(thing: Object, group: str, kind: str, uid: str) -> bool:
    owner = controller_of(thing)
    return bool(uid) and (group_of(owner), owner.get("kind"), owner.get("uid")) == (group, kind, uid)


def is_ours(thing: Object, run: AlignmentRun) -> bool:
    """Not that of an earlier run of the same name, which may still be going away."""
    return is_controlled(thing, meta.GROUP, meta.KIND, run.metadata.uid or "")


def is_made_for(job: Object, run: AlignmentRun) -> bool:
    """Whether the operator has made it for this run, whatever its owner references say now.

    By two words: the run's status has the job's UID, and the job has the run's. Who may write one of the two makes nothing ours.
    """
    known = {a.job_uid for phase in (run.status.phases if run.status else ()) for a in phase.attempts}
    said = (job["metadata"].get("annotations") or {}).get(meta.ANNOTATION_RUN_UID)
    return bool(said) and said == run.metadata.uid and job["metadata"]["uid"] in known


def is_disowned(job: Object, run: AlignmentRun) -> bool:
    """One that somebody has taken the owner reference from, and given to nobody else."""
    return not controller_of(job) and is_made_for(job, run)


def belongs(job: Object, run: AlignmentRun) -> bool:
    return is_ours(job, run) or is_disowned(job, run)


def reclaimed(job: Object, run: AlignmentRun) -> Object:
    """It, with the reference that it was made with."""
    uid = run.metadata.uid or ""
    others = [owner for owner in job["metadata"].get("ownerReferences") or () if owner.get("uid") != uid]
    return {**job, "metadata": {**job["metadata"], "ownerReferences": [*others, reference(run.name, uid)]}}


def is_of_job(thing: Object, job: Object) -> bool:
    kind = kinds.of_job(job)
    return is_controlled(thing, kind.RESOURCE.group, kind.KIND, job["metadata"]["uid"])


def is_of_earlier_run(job: Object, run: AlignmentRun) -> bool:
    """Of one of the same name, or left behind by it; or one of this run's, that somebody has given to another controller."""
    owner = controller_of(job)
    if is_made_for(job, run):
        return True
    other = (group_of(owner), owner.get("kind"), owner.get("name")) == (meta.GROUP, meta.KIND, run.name)
    return other or (not owner and _was_made_for(job, run))


def _was_made_for(job: Object, run: AlignmentRun) -> bool:
    """Whether a job that nobody owns is as an operator makes them for a run of this name. Anybody can write labels."""
    found = job["metadata"]
    which = _labelled(found.get("labels") or {})
    named = which is not None and found["name"] == job_name(run.name, *which)
    return named and bool((found.get("annotations") or {}).get(meta.ANNOTATION_DIGEST))


def told(thing: Object, kind: str = "") -> str:
    """`PyTorchJob run-sft-1 of Deployment web`, for people. Things of Kubernetes' own do not say their kind in a list."""
    owner = controller_of(thing)
    whose = (
        f"{_word(owner.get('kind'))} {_word(owner.get('name'))} (uid {_word(owner.get('uid'))})" if owner else "nobody"
    )
    return f"{kind or thing['kind']} {_word(thing['metadata']['name'])} of {whose}"


# ---------------------------------------------------------------- which attempt a job of ours is


def names(run: AlignmentRun) -> dict[str, Attempted]:
    """What the jobs of the attempts that the status remembers are called."""
    found: dict[str, Attempted] = {}
    for phase in run.status.phases if run.status else ():
        for attempt in phase.attempts:
            found[attempt.job or job_name(run.name, phase.name, attempt.number)] = (phase.name, attempt.number)
    return found


def identified(job: Object, known: Mapping[str, Attempted]) -> Object | None:
    """The job with the labels that it was made with: its name cannot be changed, its labels can. None if neither tells."""
    labels = job["metadata"].get("labels") or {}
    which = known.get(job["metadata"]["name"]) or _labelled(labels)
    if which is None:
        return None
    own = {meta.LABEL_PHASE: which[0], meta.LABEL_ATTEMPT: str(which[1])}
    return {**job, "metadata": {**job["metadata"], "labels": {**labels, **own}}}


def going(run: AlignmentRun) -> dict[Attempted, str]:
    """Attempts that have not been seen to end, with what their jobs are called."""
    ended = {(p.name, a.number) for p in (run.status.phases if run.status else ()) for a in p.attempts if a.state.ended}
    return {which: name for name, which in names(run).items() if which not in ended}


def stopping(run: AlignmentRun) -> dict[Attempted, str]:
    """Those of them that we asked to end."""
    phases = run.status.phases if run.status else ()
    asked = {(p.name, a.number) for p in phases for a in p.attempts if a.state == AttemptState.STOPPING}
    return {which: name for which, name in going(run).items() if which in asked}


def attempt_of(pod: Object, known: Mapping[Attempted, str]) -> Attempted | None:
    """Which of these attempts had the job that has made the pod."""
    which = _labelled(pod["metadata"].get("labels") or {})
    made_by = kinds.of_pod(pod).name_of(str(controller_of(pod).get("name", "")))
    return which if which is not None and known.get(which) == made_by else None


def phase_of(thing: Object) -> str:
    return str((thing["metadata"].get("labels") or {}).get(meta.LABEL_PHASE, ""))


def by_job(
    pods: Sequence[Object], jobs: Iterable[Object], between: Iterable[Object] = ()
) -> tuple[dict[str, list[Object]], list[Object]]:
    """Pods by the names of the jobs that control them, and those whose job is not among these.

    ``between``: what the jobs have made, and what makes the pods in its turn.
    """
    makers = {kinds.maker_of_pods(kind) for kind in kinds.KINDS.values()}
    called = {job["metadata"]["uid"]: job["metadata"]["name"] for job in jobs}
    above = _controllers(between)
    found: dict[str, list[Object]] = {}
    left = []
    for pod in pods:
        owner = controller_of(pod)
        if (group_of(owner), owner.get("kind")) not in makers:
            continue
        name = called.get(_top(owner.get("uid"), above) or "")
        if name is None:
            left.append(pod)
        else:
            found.setdefault(name, []).append(pod)
    return found, left


def made_by(jobs: Iterable[Object], between: Sequence[Object]) -> dict[str, list[Object]]:
    """What the jobs have made that is no pod, by their names."""
    above = _controllers(between)
    tops = [(_top(thing["metadata"]["uid"], above), thing) for thing in between]
    return {job["metadata"]["name"]: [thing for top, thing in tops if top == job["metadata"]["uid"]] for job in jobs}


def _controllers(things: Iterable[Object]) -> dict[str, str | None]:
    return {thing["metadata"]["uid"]: controller_of(thing).get("uid") for thing in things}


def _top(uid: str | None, above: Mapping[str, str | None]) -> str | None:
    """What controls it in the end. No further than there are kinds of things, since anybody may write a circle."""
    for _ in kinds.MAKERS:
        uid = above.get(uid, uid) if uid is not None else None
    return uid


def _labelled(labels: Mapping[str, str]) -> Attempted | None:
    phase, number = labels.get(meta.LABEL_PHASE), labels.get(meta.LABEL_ATTEMPT, "")
    return (phase, int(number)) if phase and re.fullmatch("[0-9]{1,9}", number) else None


def _word(text: object) -> str:
    """A kind in an owner reference may be any text."""
    return plain(str(text), WORD_LIMIT)
