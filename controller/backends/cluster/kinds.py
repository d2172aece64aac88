"""The kinds of job that a phase can run as."""

from collections.abc import Mapping
from typing import Any

from controller.api.backend import BackendName
from controller.api.run import AlignmentRun
from controller.backends.cluster import pytorchjob, trainjob
from controller.backends.cluster.kind import JobKind
from controller.backends.cluster.references import controller_of, group_of
from controller.kube.resources import Resource

KINDS: dict[str, JobKind] = {kind.KIND: kind for kind in (pytorchjob, trainjob)}

MAKERS: dict[tuple[str, str], Resource] = {who: what for kind in KINDS.values() for who, what in kind.MAKERS.items()}
"""By group and kind: all that jobs are, and make before they make pods."""


def of_run(run: AlignmentRun) -> JobKind:
    """That it has begun with, else what it says; an operator's default is filled in before."""
    begun = run.status.backend if run.status else None
    return KINDS[begun or run.spec.backend or BackendName.PYTORCHJOB]


def of_job(job: Mapping[str, Any]) -> JobKind:
    return KINDS[job["kind"]]


def of_pod(pod: Mapping[str, Any]) -> JobKind:
    """By what controls it; nothing is taken from a pod that no job controls, so for one any will do."""
    owner = controller_of(pod)
    maker = (group_of(owner), owner.get("kind"))
    return next((kind for kind in KINDS.values() if maker_of_pods(kind) == maker), KINDS[BackendName.PYTORCHJOB])


def maker_of_pods(kind: JobKind) -> tuple[str, str]:
    return list(kind.MAKERS)[-1]
