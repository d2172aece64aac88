"""The kinds of job that a phase can run as."""

from collections.abc import Mapping
from typing import Any

from controller.backends.cluster import pytorchjob
from controller.backends.cluster.kind import JobKind
from controller.backends.cluster.references import controller_of, group_of

KINDS: dict[str, JobKind] = {kind.KIND: kind for kind in (pytorchjob,)}


def of_job(job: Mapping[str, Any]) -> JobKind:
    return KINDS[job["kind"]]


def of_pod(pod: Mapping[str, Any]) -> JobKind:
    """By what controls it; nothing is taken from a pod that no job controls, so for one any will do."""
    owner = controller_of(pod)
    maker = (group_of(owner), owner.get("kind"))
    return next((kind for kind in KINDS.values() if maker == kind.MAKER), pytorchjob)
