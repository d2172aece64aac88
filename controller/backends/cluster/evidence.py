"""Why a pod failed, or does not run: the true reason, from what Kubernetes, Kueue or the phase program itself left on it.

A job's own word is "1 Worker replica(s) failed", which helps nobody.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum, auto
from typing import Any

from pydantic import ValidationError

from controller.backends.cluster import kinds
from controller.backends.cluster.conditions import condition
from trainers.contract import FAILURES, FailureClass, Termination, cause_rank

Object = Mapping[str, Any]

SIGNALS = {134: "SIGABRT", 135: "SIGBUS", 136: "SIGFPE", 137: "SIGKILL", 139: "SIGSEGV", 143: "SIGTERM"}

DISRUPTIONS = {
    "PreemptionByScheduler": (FailureClass.INTERRUPTED, "preempted by a pod of higher priority"),
    "EvictionByEvictionAPI": (FailureClass.INTERRUPTED, "evicted (a drain of the node, or another use of the Eviction API)"),
    "TerminationByKubelet": (FailureClass.INTERRUPTED, "ended by the kubelet"),
    "DeletionByTaintManager": (FailureClass.INFRASTRUCTURE, "its node is lost or tainted NoExecute"),
    "DeletionByPodGC": (FailureClass.INFRASTRUCTURE, "its node no longer exists"),
}  # fmt: skip
"""Reasons of the pod condition DisruptionTarget (KEP-3329)."""

POD_REASONS = {
    "Evicted": FailureClass.INTERRUPTED,
    "NodeShutdown": FailureClass.INTERRUPTED,
    "Terminated": FailureClass.INTERRUPTED,
    "Preempting": FailureClass.INTERRUPTED,
}
"""Reasons of a failed pod; others (NodeLost, UnexpectedAdmissionError, ...) are the infrastructure's."""

BAD_WAITS = ("InvalidImageName",)
"""Reasons to wait that time cannot heal."""


class Source(Enum):
    """What a reason rests on."""

    SEEN = auto()
    """Somebody saw it done to the pod, or to a process in it: a disruption, a kill."""
    SAID = auto()
    """The phase program's word, or how it crashed."""
    GUESSED = auto()
    """An exit status that means nothing in particular."""


@dataclass(frozen=True)
class Evidence:
    failure: FailureClass
    message: str
    source: Source = Source.SAID
    node: str = ""
    at: str = ""
    """When, as Kubernetes writes it: sorts as text."""
    lost: int | None = None
    """The pod, by its place in the job, that this one says is gone."""


def find(pods: Iterable[Object]) -> Evidence | None:
    """The root cause among a job's pods. Of a silent node its peers tell, long before Kubernetes notices."""
    pods = list(pods)
    found = [evidence for pod in pods if (evidence := of_pod(pod)) is not None]
    cause = min(found, key=lambda e: (_place(e), e.at or "~"), default=None)
    if cause is None or cause.lost is None:
        return cause
    node = next((pod["spec"].get("nodeName", "") for pod in pods if index(pod) == cause.lost), "")
    return replace(cause, node=node)


def _place(evidence: Evidence) -> float:
    """Among causes. A pod that ended without a word, as a launcher does that lost its peers, explains no other pod's end."""
    if evidence.source == Source.GUESSED:
        return math.inf
    return cause_rank(evidence.failure, evidence.source == Source.SEEN)


def of_pod(pod: Object) -> Evidence | None:
    """Why this pod failed or is going down; None if it does neither."""
    terminated = container_state(pod, "terminated")
    node, at = pod["spec"].get("nodeName", ""), terminated.get("finishedAt", "")
    for found in (
        _oom(pod, terminated),
        _own_word(pod, terminated),
        _disruption(pod),
        _pod_reason(pod),
        _exit(pod, terminated),
    ):
        if found is not None:
            said = termination(pod)
            return Evidence(*found, node, at, said.lost_node if said is not None else None)
    return None


Found = tuple[FailureClass, str, Source] | None


def _oom(pod: Object, terminated: Object) -> Found:
    if terminated.get("reason") != "OOMKilled":
        return None
    limit = container(pod).get("resources", {}).get("limits", {}).get("memory")
    said = f"its memory limit of {limit}" if limit else "what its node has"
    return FailureClass.OUT_OF_MEMORY, f"OOMKilled: the pod needs more memory than {said}", Source.SEEN


def termination(pod: Object) -> Termination | None:
    """What the phase program said at its end."""
    text = container_state(pod, "terminated").get("message", "")
    try:
        return Termination.model_validate_json(text)
    except ValidationError:
        return None


def _own_word(pod: Object, terminated: Object) -> Found:
    said = termination(pod)
    if said is None or said.failure is None or terminated.get("exitCode") == 0:
        return None
    disruption = _disruption(pod)
    if said.failure == FailureClass.INTERRUPTED and disruption is not None:
        return said.failure, f"{disruption[1]}; {said.message}", Source.SEEN
    if said.failure == FailureClass.INFRASTRUCTURE and disruption is not None:
        return disruption  # what it met on its way down
    return said.failure, said.message, Source.SEEN if said.seen else Source.SAID


def _disruption(pod: Object) -> Found:
    target = condition(pod, "DisruptionTarget")
    if target.get("status") != "True":
        return None
    known = DISRUPTIONS.get(target.get("reason", ""))
    failure, meaning = known or (FailureClass.INFRASTRUCTURE, "disrupted")
    more = f" ({target['message']})" if target.get("message") else ""
    return failure, f"{target.get('reason')}: {meaning}{more}", Source.SEEN


def _pod_reason(pod: Object) -> Found:
    status = pod["status"]
    if status.get("phase") != "Failed" or not status.get("reason"):
        return None
    failure = POD_REASONS.get(status["reason"], FailureClass.INFRASTRUCTURE)
    return failure, f"{status['reason']}: {status.get('message', '')}".rstrip(": "), Source.SEEN


def _exit(pod: Object, terminated: Object) -> Found:
    code = terminated.get("exitCode", 0)
    if code == 0:
        return None
    if code == 137:
        # A pod that is deleted once its peers have failed is killed when its grace is over.
        source = Source.SAID if pod["metadata"].get("deletionTimestamp") else Source.SEEN
        return FailureClass.INFRASTRUCTURE, "ended by SIGKILL", source
    if code == 143:
        return FailureClass.INTERRUPTED, "ended by SIGTERM before it could save", Source.SAID
    if code in SIGNALS:
        return FailureClass.INTERNAL, f"crashed with {SIGNALS[code]}", Source.SAID
    failure = next((f for f, known in FAILURES.items() if known.code == code), FailureClass.INTERNAL)
    lines = [line for line in terminated.get("message", "").splitlines() if line.strip()]
    last = lines[-1].strip()[:500] if lines else "nothing was printed"
    source = Source.GUESSED if failure == FailureClass.INTERNAL else Source.SAID
    return failure, f"exit status {code}: {last}", source


# ---------------------------------------------------------------- pods that do not run yet


def hopeless(pods: Iterable[Object]) -> Evidence | None:
    """A pod that waits for something that will never come."""
    for pod in pods:
        waiting = container_state(pod, "waiting")
        if waiting.get("reason") in BAD_WAITS:
            return Evidence(FailureClass.BAD_INPUT, _waiting(waiting, container(pod).get("image", "")))
    return None


def holdup(pods: Iterable[Object]) -> str:
    """What keeps the pods from running, in one line; empty if nothing is known to."""
    return next((text for pod in pods for text in _holdups(pod)), "")


def _holdups(pod: Object) -> Iterator[str]:
    scheduled = condition(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        yield f"{scheduled.get('reason', 'Unschedulable')}: {scheduled.get('message', '')}"
    if text := _waiting(container_state(pod, "waiting"), container(pod).get("image", "")):
        yield text
    for status in pod["status"].get("initContainerStatuses", []):
        if text := _waiting(status["state"].get("waiting") or {}, status.get("image", "")):
            yield f"{status['name']}: {text}"


def _waiting(waiting: Object, image: str) -> str:
    if waiting.get("reason") in (None, "ContainerCreating", "PodInitializing"):
        return ""
    where = f" {image}" if image and "Image" in waiting["reason"] else ""
    return f"{waiting['reason']}{where}: {waiting.get('message', '')}".rstrip(": ")


# ---------------------------------------------------------------- reading pods


def container(pod: Object) -> Object:
    """The one that trains: injectors put theirs before it, or behind."""
    trains = kinds.of_pod(pod).CONTAINER
    return next((c for c in pod["spec"]["containers"] if c["name"] == trains), {})


def container_state(pod: Object, state: str) -> Object:
    """`waiting`, `running` or `terminated` of the container that trains; empty if it is in another state."""
    statuses, trains = pod["status"].get("containerStatuses", []), kinds.of_pod(pod).CONTAINER
    found: Object = next((s.get("state", {}) for s in statuses if s["name"] == trains), {})
    return found.get(state) or {}


def index(pod: Object) -> int:
    """The pod's place in its job: node rank. By its name, which nobody can change; -1 if that tells none."""
    place = kinds.of_pod(pod).PLACE.search(pod["metadata"]["name"])
    return int(place[1]) if place else -1


def has_ended(pod: Object, now: datetime, patience: float) -> bool:
    """Whether nothing of this pod runs any more, as far as anyone can know.

    A pod on a lost node stays Terminating for ever. Once its grace is over by ``patience`` seconds, or at once if its node
    is known to be silent, it counts as ended: a machine that comes back finds its pods deleted. What trains is never
    started again in a pod, so that what else runs there does not matter.
    """
    if pod["status"].get("phase") in ("Failed", "Succeeded") or container_state(pod, "terminated"):
        return True
    deleted = pod["metadata"].get("deletionTimestamp")
    if deleted is None:
        return False
    if condition(pod, "DisruptionTarget").get("reason") == "DeletionByTaintManager":
        return True
    return (now - timestamp(deleted)).total_seconds() > patience


def left(pods: Sequence[Object], now: datetime, patience: float) -> str:
    """The first that has not ended, and for how long it may go on. The others are not counted: each end would be news."""
    going = [pod for pod in pods if not has_ended(pod, now, patience)]
    if not going:
        return ""
    others = ", one of several," if len(going) > 1 else ""
    return f"pod {going[0]['metadata']['name']}{others} {until(going[0]) or 'has not ended'}"


def until(pod: Object) -> str:
    """How long a pod that was deleted may go on; empty of one that was not."""
    deleted = pod["metadata"].get("deletionTimestamp")
    return f"has until {deleted} to save its work" if deleted else ""


def timestamp(text: str) -> datetime:
    return datetime.fromisoformat(text)
