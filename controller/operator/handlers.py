"""kopf as transport: it lists and watches, and every event only says which run wants a look.

No handlers for creation, update or deletion, no timers, no finalizers, no annotations: those are edge-triggered, and a
finalizer would keep a namespace from going away once the operator is gone.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import kopf

from controller.api import meta
from controller.kube.resources import RUNS, WATCHED, Resource

Notify = Callable[[Resource, str | None, Mapping[str, Any]], None]
"""Told of a resource, the kind of the event (None in the first listing) and the object."""

OURS = f"{meta.LABEL_MANAGED_BY}={meta.PRODUCT}"

# Measured with 1,000 and 10,000 runs: kopf's defaults take four times the memory and ten times as long, and a limit of
# workers alone makes it crawl, because a worker keeps its place for the idle time after its last event.
WORKERS = 32
IDLE_SECONDS = 0.005

CHUNK = 50
"""Objects that kopf lists at once. Who may make pods may give each a quarter of a megabyte of annotations, and a page is held
three times over: as it came, as text, and as what that says."""


class NoDiffs(kopf.DiffBaseStorage):
    """Nobody asks what has changed since when. kopf would copy and compare each object, three quarters of an event's time."""

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:
        return None

    def build(self, *, body: kopf.Body, extra_fields: Iterable[Any] | None = None) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        """Nothing is written into an object."""


class NoProgress(kopf.ProgressStorage):
    """Of handlers, that is: ours have none that would have to be remembered."""

    def fetch(self, *, key: Any, body: kopf.Body) -> None:
        return None

    def store(self, **_: Any) -> None:
        """Nothing is written into an object."""

    def purge(self, **_: Any) -> None:
        """Nothing is there."""

    def touch(self, **_: Any) -> None:
        """Nothing is written into an object."""

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence


def registry(
    resources: Iterable[Resource], notify: Notify, login: Callable[[], kopf.ConnectionInfo]
) -> kopf.OperatorRegistry:
    """Everything that kopf is asked to do."""
    handlers = kopf.OperatorRegistry()

    @kopf.on.login(registry=handlers)
    def _login(**_: Any) -> kopf.ConnectionInfo:
        return login()

    for resource in resources:
        _listen(handlers, resource, notify)
    return handlers


def _listen(handlers: kopf.OperatorRegistry, resource: Resource, notify: Notify) -> None:
    @kopf.on.event(resource.group, resource.version, resource.plural, registry=handlers)
    async def _event(event: Mapping[str, Any], **_: Any) -> None:
        notify(resource, event["type"], event["object"])


def settings() -> kopf.OperatorSettings:
    chosen = kopf.OperatorSettings()
    chosen.queueing.worker_limit = WORKERS
    chosen.queueing.idle_timeout = IDLE_SECONDS
    chosen.persistence.diffbase_storage = NoDiffs()
    chosen.persistence.progress_storage = NoProgress()
    for resource in WATCHED:
        if resource != RUNS:
            chosen.watching.label_selectors[_selector(resource)] = OURS
    chosen.watching.chunk_size = CHUNK
    chosen.watching.server_timeout = 300
    chosen.watching.client_timeout = 330
    chosen.watching.connect_timeout = 10
    chosen.networking.request_timeout = 30
    chosen.networking.connect_timeout = 10
    # Events on objects are written by us, on transitions only.
    chosen.posting.enabled = False
    # Only one replica acts because of our Lease; kopf's peering freezes replicas of equal priority.
    chosen.peering.standalone = True
    # Without rights on CRDs and namespaces of the whole cluster.
    chosen.scanning.disabled = True
    return chosen


def _selector(resource: Resource) -> tuple[str, str]:
    return resource.group, resource.plural
