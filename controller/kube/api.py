"""The calls by what they are for."""

import contextlib
from collections.abc import Awaitable, Mapping

from controller.kube.answers import Conflict, NotFound, items
from controller.kube.calls import Call
from controller.kube.resources import (
    CORE_EVENTS,
    EVENTS,
    LEASES,
    NETWORK_POLICIES,
    PODS,
    RUN_STATUS,
    RUNS,
    TRAINING_RUNTIMES,
    WORKLOADS,
    Object,
    Resource,
)
from controller.kube.transport import Transport
from controller.projection import slim

MOST_WARNINGS = 20
"""Kubernetes counts one that comes again in place of writing it again, and forgets it after an hour."""


class Api:
    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._workloads = WORKLOADS
        """The version that was served last is tried first."""

    # -- runs

    async def get_run(self, namespace: str, name: str) -> Object | None:
        return await _absent_is_none(self.transport.call(Call("get", RUNS), namespace, name))

    async def create_run(self, run: Object) -> Object:
        metadata = run["metadata"]
        # Otherwise a field that nobody knows would be dropped without a word.
        strict = {"fieldValidation": "Strict"}
        return await self.transport.call(Call("create", RUNS), metadata["namespace"], metadata["name"], run, strict)

    async def delete_run(self, namespace: str, name: str, uid: str, version: str | None = None) -> None:
        """``version``: only if it is still as it was then."""
        await self._delete(Call("delete", RUNS), namespace, name, {"uid": uid, "resourceVersion": version})

    async def write_run_status(self, run: Object, status: Object) -> Object:
        """Replace the status. Raises Conflict if the run has changed since it was read. Of the rest nothing is looked at."""
        metadata = {name: run["metadata"][name] for name in ("name", "namespace", "uid", "resourceVersion")}
        body = {"apiVersion": run["apiVersion"], "kind": run["kind"], "metadata": metadata, "status": status}
        return await self.transport.call(Call("update", RUN_STATUS), metadata["namespace"], metadata["name"], body)

    # -- jobs and what belongs to them

    async def list_jobs(self, kind: Resource, namespace: str, labels: Mapping[str, str]) -> list[Object]:
        return await self._slim(kind, namespace, labels)

    async def get_job(self, kind: Resource, namespace: str, name: str) -> Object | None:
        return await _absent_is_none(self.transport.call(Call("get", kind), namespace, name))

    async def create_job(self, kind: Resource, job: Object) -> Object:
        """Raises Conflict if there is one of this name."""
        metadata = job["metadata"]
        return await self.transport.call(Call("create", kind), metadata["namespace"], metadata["name"], job)

    async def update_job(self, kind: Resource, job: Object) -> Object:
        """Raises Conflict if it has changed since it was read."""
        metadata = job["metadata"]
        return await self.transport.call(Call("update", kind), metadata["namespace"], metadata["name"], job)

    async def delete_job(
        self, kind: Resource, namespace: str, name: str, uid: str, propagation: str = "Foreground"
    ) -> None:
        """In the foreground the job stays visible until its pods have ended."""
        await self._delete(Call("delete", kind), namespace, name, {"uid": uid}, propagationPolicy=propagation)

    async def get_runtime(self, namespace: str, name: str) -> Object | None:
        return await _absent_is_none(self.transport.call(Call("get", TRAINING_RUNTIMES), namespace, name))

    async def create_runtime(self, runtime: Object) -> Object:
        """Raises Conflict if there is one of this name."""
        metadata = runtime["metadata"]
        return await self.transport.call(
            Call("create", TRAINING_RUNTIMES), metadata["namespace"], metadata["name"], runtime
        )

    async def update_runtime(self, runtime: Object) -> Object:
        """Raises Conflict if it has changed since it was read."""
        metadata = runtime["metadata"]
        return await self.transport.call(
            Call("update", TRAINING_RUNTIMES), metadata["namespace"], metadata["name"], runtime
        )

    async def get_network_policy(self, namespace: str, name: str) -> Object | None:
        return await _absent_is_none(self.transport.call(Call("get", NETWORK_POLICIES), namespace, name))

    async def create_network_policy(self, policy: Object) -> None:
        """Raises Conflict if there is one of this name."""
        metadata = policy["metadata"]
        await self.transport.call(Call("create", NETWORK_POLICIES), metadata["namespace"], metadata["name"], policy)

    async def update_network_policy(self, policy: Object) -> None:
        """Raises Conflict if it has changed since it was read."""
        metadata = policy["metadata"]
        await self.transport.call(Call("update", NETWORK_POLICIES), metadata["namespace"], metadata["name"], policy)

    async def list_pods(self, namespace: str, labels: Mapping[str, str]) -> list[Object]:
        return await self._slim(PODS, namespace, labels)

    async def get_workload(self, namespace: str, name: str) -> Object | None:
        """None also where Kueue serves another version than it did."""
        return await _absent_is_none(self.transport.call(Call("get", self._workloads[0]), namespace, name))

    async def list_workloads(self, namespace: str, labels: Mapping[str, str]) -> list[Object] | None:
        """Kueue's, of whichever version is served; None where Kueue is not installed."""
        for resource in self._workloads:
            try:
                found = await self.transport.listed(Call("list", resource), namespace, labels)
            except NotFound:
                continue
            self._workloads = (resource, *(other for other in WORKLOADS if other != resource))
            return found
        return None

    async def list_warnings(self, namespace: str, uid: str) -> list[Object]:
        """Warning events about an object. Anybody may write some, of a megabyte each: no more are read than there ever are."""
        fields = {"fieldSelector": f"involvedObject.uid={uid},type=Warning", "limit": str(MOST_WARNINGS)}
        page = await self.transport.call(Call("list", CORE_EVENTS), namespace, None, query=fields)
        found: list[Object] | None = page.get("items")
        return found or []

    # -- the operator's own

    async def create_event(self, event: Object) -> None:
        metadata = event["metadata"]
        await self.transport.call(Call("create", EVENTS), metadata["namespace"], metadata["name"], event)

    async def get_lease(self, namespace: str, name: str) -> Object | None:
        return await _absent_is_none(self.transport.call(Call("get", LEASES), namespace, name))

    async def create_lease(self, lease: Object) -> Object:
        return await self.transport.call(
            Call("create", LEASES), lease["metadata"]["namespace"], lease["metadata"]["name"], lease
        )

    async def update_lease(self, lease: Object) -> Object:
        return await self.transport.call(
            Call("update", LEASES), lease["metadata"]["namespace"], lease["metadata"]["name"], lease
        )

    async def serves(self, resource: Resource, namespace: str | None) -> bool:
        """Whether the API server knows the kind."""
        try:
            await self.transport.call(Call("list", resource), namespace, None, query={"limit": "1"})
        except NotFound:
            return False
        return True

    async def _slim(self, resource: Resource, namespace: str, labels: Mapping[str, str]) -> list[Object]:
        """As much of each as anybody reads, page by page: whoever makes them may have put a megabyte into each."""
        pages = self.transport.pages(Call("list", resource), namespace, labels)
        return [slim(resource, item) async for page in pages for item in items(page)]

    async def _delete(
        self, call: Call, namespace: str, name: str, only: Mapping[str, str | None], **options: str
    ) -> None:
        """This very object: one that has got its name meanwhile is somebody else's, and ours is gone then."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": only, **options}
        with contextlib.suppress(NotFound, Conflict):
            await self.transport.call(call, namespace, name, body)


async def _absent_is_none(answer: Awaitable[Object]) -> Object | None:
    try:
        return await answer
    except NotFound:
        return None
