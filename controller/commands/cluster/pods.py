"""A pod of an attempt: whether it has a log, and why not."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from controller.api import meta
from controller.api.text import plain
from controller.backends.cluster import evidence, kinds
from controller.backends.cluster.evidence import container_state
from controller.backends.cluster.references import controller_of


@dataclass(frozen=True)
class Pod:
    document: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.document["metadata"]["name"])

    @property
    def uid(self) -> str:
        return str(self.document["metadata"]["uid"])

    @property
    def created(self) -> str:
        return str(self.document["metadata"]["creationTimestamp"])

    @property
    def attempt(self) -> int:
        number = str(self.document["metadata"]["labels"].get(meta.LABEL_ATTEMPT, ""))
        return int(number) if number.isascii() and number.isdigit() else 0

    @property
    def job(self) -> str:
        """Name of the job that it belongs to; empty if it belongs to none."""
        kind, owner = kinds.of_pod(self.document), controller_of(self.document)
        return kind.name_of(str(owner["name"])) if owner.get("kind") == kinds.maker_of_pods(kind)[1] else ""

    @property
    def container(self) -> str:
        """The one whose log it is."""
        return kinds.of_pod(self.document).CONTAINER

    @property
    def index(self) -> int:
        """0 is rank 0."""
        return evidence.index(self.document)

    @property
    def has_log(self) -> bool:
        return bool(container_state(self.document, "running") or container_state(self.document, "terminated"))

    @property
    def ended(self) -> bool:
        over = self.document["status"].get("phase") in ("Succeeded", "Failed")
        return over or bool(container_state(self.document, "terminated"))

    @property
    def holdup(self) -> str:
        """What keeps it from running, as far as the pod itself says."""
        status = self.document["status"]
        if status.get("phase") == "Failed":
            return plain(": ".join(filter(None, (status.get("reason"), status.get("message")))))
        return plain(evidence.holdup([self.document]) or _init(status.get("initContainerStatuses") or []))

    @property
    def stage(self) -> str:
        """The waiting container's word, for want of anything better: ContainerCreating."""
        return plain(container_state(self.document, "waiting").get("reason") or "not scheduled yet")


def _init(statuses: Iterable[Mapping[str, Any]]) -> str:
    for status in statuses:
        waiting = status.get("state", {}).get("waiting") or {}
        if waiting.get("reason") not in (None, "PodInitializing"):
            return f"{status['name']}: {waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")
    return ""


def of_attempt(pods: Sequence[Pod], attempt: int) -> dict[int, Pod]:
    """By index; the newest where a job was started anew under its name, as a queue does after it took a job's room."""
    return {pod.index: pod for pod in sorted(pods, key=lambda pod: pod.created) if pod.attempt == attempt}
