"""The only module of the controller that talks to the API server. RBAC rules are generated from :data:`CALLS`.

A thin client on aiohttp, which kopf brings: importing the official one costs about 40 MB in a process that makes a dozen
different calls. Nothing is retried here; the work queue does that.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

from controller.api import meta
from controller.api.text import plain

Object = dict[str, Any]

TIMEOUT = aiohttp.ClientTimeout(total=30, connect=10)
PAGE = 500
"""Objects in one answer to a list call."""
LONGEST_WAIT_SECONDS = 300.0
"""That an answer may ask for: a run would stand still for ever, if a proxy asks for a year."""
METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
CHANGES_OF_METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
CATCH_UP_SECONDS = 10
"""Of a watch that is to end soon. Two seconds before, the API server says how far it has told."""
CATCH_UP_PATIENCE_SECONDS = 2.0
TOO_OLD = 410
CREDENTIALS_SECONDS = 60.0
"""A pod's token is renewed in its file about every hour."""


@dataclass(frozen=True)
class Resource:
    group: str
    version: str
    plural: str
    subresource: str = ""

    def path(self, namespace: str | None, name: str | None = None) -> str:
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = [root, *(["namespaces", namespace] if namespace else []), self.plural]
        return "/".join([*parts, *filter(None, (name, self.subresource))])


RUNS = Resource(meta.GROUP, meta.VERSION, meta.PLURAL)
RUN_STATUS = Resource(meta.GROUP, meta.VERSION, meta.PLURAL, "status")
PYTORCHJOBS = Resource("kubeflow.org", "v1", "pytorchjobs")
TRAINJOBS = Resource("trainer.kubeflow.org", "v1alpha1", "trainjobs")
TRAINING_RUNTIMES = Resource("trainer.kubeflow.org", "v1alpha1", "trainingruntimes")
JOBSETS = Resource("jobset.x-k8s.io", "v1alpha2", "jobsets")
BATCH_JOBS = Resource("batch", "v1", "jobs")
PODS = Resource("", "v1", "pods")
WORKLOADS = Resource("kueue.x-k8s.io", "v1beta2", "workloads")
EVENTS = Resource("events.k8s.io", "v1", "events")
CORE_EVENTS = Resource("", "v1", "events")
"""The same events by their older name, under which they can be selected by the object that they are about."""
NETWORK_POLICIES = Resource("networking.k8s.io", "v1", "networkpolicies")
LEASES = Resource("coordination.k8s.io", "v1", "leases")

JOBS = (PYTORCHJOBS, TRAINJOBS)
"""What a phase can run as."""
BETWEEN = (JOBSETS, BATCH_JOBS)
"""What is made of such a job before pods are."""
WATCHED = (RUNS, *JOBS, *BETWEEN, PODS)
"""What kopf lists and watches for us, where it is installed."""


@dataclass
class Versions:
    """Of all objects of a kind, by UID."""

    found: dict[str, str]
    at: str
    """When: the resourceVersion of all together."""


@dataclass(frozen=True)
class Call:
    verb: str
    resource: Resource


CALLS = (
    Call("get", RUNS),
    *(Call(verb, resource) for resource in WATCHED for verb in ("list", "watch")),
    Call("delete", RUNS),
    Call("update", RUN_STATUS),
    *(Call(verb, resource) for resource in JOBS for verb in ("get", "create", "delete")),
    *(Call("get", resource) for resource in BETWEEN),
    *(Call(verb, TRAINING_RUNTIMES) for verb in ("get", "create", "update")),
    Call("list", WORKLOADS),
    Call("create", EVENTS),
    Call("list", CORE_EVENTS),
)
"""In the namespaces that are watched."""

WALL_CALLS = tuple(Call(verb, NETWORK_POLICIES) for verb in ("get", "create", "update"))
"""In the same, where runs have NetworkPolicies."""

LEASE_CALLS = (Call("get", LEASES), Call("create", LEASES), Call("update", LEASES))
"""In the operator's own namespace."""

SMOKE_CALLS = (Call("create", RUNS), Call("delete", RUNS), Call("get", RUNS))
"""Of :mod:`controller.operator.smoke`, which has rights of its own."""

METHODS = {"get": "GET", "list": "GET", "watch": "GET", "create": "POST", "update": "PUT", "delete": "DELETE"}


class ApiError(Exception):
    """The API server said no."""

    def __init__(self, call: Call, name: str, status: int, message: str, retry_after: float | None = None) -> None:
        # A webhook may have said it, or quoted what a user wrote.
        self.message = plain(message)
        super().__init__(f"{call.verb} {call.resource.plural} {name}: {status} {self.message}")
        self.status = status
        self.retry_after = retry_after
        """Seconds that the server asked us to wait."""


class Conflict(ApiError):
    """Someone else has written it since we read it, or it exists already."""


class NotFound(ApiError):
    """The object is not there, or its kind is unknown to the server."""


class Connection(Protocol):
    """What is needed of kopf's ConnectionInfo."""

    @property
    def server(self) -> str: ...

    def as_http_headers(self) -> dict[str, str]: ...

    def as_ssl_context(self) -> Any: ...


Login = Callable[[], Connection]
Observer = Callable[[Call, str, float], None]
"""Told of every call, its outcome (status code, or `error`) and its seconds."""
Dated = Callable[[str, float], None]
"""Told of the date of every answer, and how many seconds it took."""


class Api:
    def __init__(
        self, login: Login, observe: Observer = lambda call, code, seconds: None,
        dated: Dated = lambda date, seconds: None,
    ) -> None:  # fmt: skip
        self._login = login
        self._observe = observe
        self._dated = dated
        self._session: aiohttp.ClientSession | None = None
        self._connection: Connection | None = None
        self._read_at = 0.0
        self._connecting = asyncio.Lock()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    # -- runs

    async def get_run(self, namespace: str, name: str) -> Object | None:
        return await _absent_is_none(self._call(Call("get", RUNS), namespace, name))

    async def create_run(self, run: Object) -> Object:
        metadata = run["metadata"]
        # Otherwise a field that nobody knows would be dropped without a word.
        strict = {"fieldValidation": "Strict"}
        return await self._call(Call("create", RUNS), metadata["namespace"], metadata["name"], run, strict)

    async def delete_run(self, namespace: str, name: str, uid: str, version: str | None = None) -> None:
        """``version``: only if it is still as it was then."""
        await self._delete(Call("delete", RUNS), namespace, name, {"uid": uid, "resourceVersion": version})

    async def write_run_status(self, run: Object, status: Object) -> Object:
        """Replace the status. Raises Conflict if the run has changed since it was read. Of the rest nothing is looked at."""
        metadata = {name: run["metadata"][name] for name in ("name", "namespace", "uid", "resourceVersion")}
        body = {"apiVersion": run["apiVersion"], "kind": run["kind"], "metadata": metadata, "status": status}
        return await self._call(Call("update", RUN_STATUS), metadata["namespace"], metadata["name"], body)

    # -- jobs and what belongs to them

    async def list_jobs(self, kind: Resource, namespace: str, labels: Mapping[str, str]) -> list[Object]:
        return await self._list(Call("list", kind), namespace, labels)

    async def get_job(self, kind: Resource, namespace: str, name: str) -> Object | None:
        return await _absent_is_none(self._call(Call("get", kind), namespace, name))

    async def create_job(self, kind: Resource, job: Object) -> Object:
        """Raises Conflict if there is one of this name."""
        metadata = job["metadata"]
        return await self._call(Call("create", kind), metadata["namespace"], metadata["name"], job)

    async def delete_job(
        self, kind: Resource, namespace: str, name: str, uid: str, propagation: str = "Foreground"
    ) -> None:
        """In the foreground the job stays visible until its pods have ended."""
        await self._delete(Call("delete", kind), namespace, name, {"uid": uid}, propagationPolicy=propagation)

    async def get_runtime(self, namespace: str, name: str) -> Object | None:
        return await _absent_is_none(self._call(Call("get", TRAINING_RUNTIMES), namespace, name))

    async def create_runtime(self, runtime: Object) -> Object:
        """Raises Conflict if there is one of this name."""
        metadata = runtime["metadata"]
        return await self._call(Call("create", TRAINING_RUNTIMES), metadata["namespace"], metadata["name"], runtime)

    async def update_runtime(self, runtime: Object) -> Object:
        """Raises Conflict if it has changed since it was read."""
        metadata = runtime["metadata"]
        return await self._call(Call("update", TRAINING_RUNTIMES), metadata["namespace"], metadata["name"], runtime)

    async def get_network_policy(self, namespace: str, name: str) -> Object | None:
        return await _absent_is_none(self._call(Call("get", NETWORK_POLICIES), namespace, name))

    async def create_network_policy(self, policy: Object) -> None:
        """Raises Conflict if there is one of this name."""
        metadata = policy["metadata"]
        await self._call(Call("create", NETWORK_POLICIES), metadata["namespace"], metadata["name"], policy)

    async def update_network_policy(self, policy: Object) -> None:
        """Raises Conflict if it has changed since it was read."""
        metadata = policy["metadata"]
        await self._call(Call("update", NETWORK_POLICIES), metadata["namespace"], metadata["name"], policy)

    async def list_pods(self, namespace: str, labels: Mapping[str, str]) -> list[Object]:
        return await self._list(Call("list", PODS), namespace, labels)

    async def list_workloads(self, namespace: str, labels: Mapping[str, str]) -> list[Object] | None:
        """Kueue's; None where Kueue is not installed."""
        try:
            return await self._list(Call("list", WORKLOADS), namespace, labels)
        except NotFound:
            return None

    async def list_warnings(self, namespace: str, uid: str) -> list[Object]:
        """Warning events about an object."""
        fields = {"fieldSelector": f"involvedObject.uid={uid},type=Warning"}
        return await self._list(Call("list", CORE_EVENTS), namespace, {}, more=fields)

    # -- the operator's own

    async def create_event(self, event: Object) -> None:
        metadata = event["metadata"]
        await self._call(Call("create", EVENTS), metadata["namespace"], metadata["name"], event)

    async def get_lease(self, namespace: str, name: str) -> Object | None:
        return await _absent_is_none(self._call(Call("get", LEASES), namespace, name))

    async def create_lease(self, lease: Object) -> Object:
        return await self._call(
            Call("create", LEASES), lease["metadata"]["namespace"], lease["metadata"]["name"], lease
        )

    async def update_lease(self, lease: Object) -> Object:
        return await self._call(
            Call("update", LEASES), lease["metadata"]["namespace"], lease["metadata"]["name"], lease
        )

    async def serves(self, resource: Resource, namespace: str | None) -> bool:
        """Whether the API server knows the kind."""
        try:
            await self._call(Call("list", resource), namespace, None, query={"limit": "1"})
        except NotFound:
            return False
        return True

    async def list_versions(self, resource: Resource, namespace: str | None, labels: Mapping[str, str]) -> Versions:
        """What a watch must have told us by now."""
        versions = Versions({}, "")
        async for page in self._pages(Call("list", resource), namespace, labels, METADATA_ONLY):
            metadata = [item["metadata"] for item in _items(page)]
            versions.found |= {one["uid"]: one["resourceVersion"] for one in metadata}
            versions.at = versions.at or page["metadata"].get("resourceVersion", "")
        return versions

    async def catch_up(
        self, resource: Resource, namespace: str | None, labels: Mapping[str, str], versions: Versions
    ) -> bool:
        """Bring them up to now, for what the changes since then cost. False: it is not known whether these are all."""
        # An API server that has seen no change since its start does not say how far it has told. To be asked makes it look.
        await self._call(Call("list", resource), namespace, None, query={"limit": "1"}, accept=METADATA_ONLY)
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(CATCH_UP_SECONDS + CATCH_UP_PATIENCE_SECONDS),
                contextlib.aclosing(self._events_since(resource, namespace, labels, versions.at)) as events,
            ):
                async for event in events:
                    if _told(event, versions):
                        return True
        return False

    async def _events_since(
        self, resource: Resource, namespace: str | None, labels: Mapping[str, str], version: str
    ) -> AsyncGenerator[Object]:
        """Without those objects, but for who they are. Ends early where the version is too old to go on from."""
        call = Call("watch", resource)
        query = {
            "watch": "1", "resourceVersion": version, "allowWatchBookmarks": "true",
            "timeoutSeconds": str(CATCH_UP_SECONDS), "labelSelector": _selector(labels),
        }  # fmt: skip
        async with self._request(call, namespace, None, query=query, accept=CHANGES_OF_METADATA) as response:
            if response.status == TOO_OLD:
                return
            if response.status >= 400:
                raise _error(call, "", response, await response.text(errors="replace"))
            async for line in _lines(response):
                event = _object(call, "", response.status, line)
                if event.get("type") == "ERROR":
                    return
                if not isinstance(event.get("object"), dict) or "metadata" not in event["object"]:
                    raise ApiError(call, "", response.status, "the answer is no watch")
                yield event

    # -- how

    async def _delete(
        self, call: Call, namespace: str, name: str, only: Mapping[str, str | None], **options: str
    ) -> None:
        """This very object: one that has got its name meanwhile is somebody else's, and ours is gone then."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": only, **options}
        with contextlib.suppress(NotFound, Conflict):
            await self._call(call, namespace, name, body)

    async def _list(
        self, call: Call, namespace: str | None, labels: Mapping[str, str], more: Mapping[str, str] | None = None
    ) -> list[Object]:
        pages = self._pages(call, namespace, labels, more=more)
        return [item async for page in pages for item in _items(page)]

    async def _pages(
        self, call: Call, namespace: str | None, labels: Mapping[str, str], accept: str = "application/json",
        more: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Object]:  # fmt: skip
        """One by one: ten thousand objects at once are a hundred megabytes."""
        query = {"limit": str(PAGE), "labelSelector": _selector(labels), **(more or {})}
        while True:
            answer = await self._call(call, namespace, None, query=query, accept=accept)
            if "items" not in answer:
                raise ApiError(call, "", 200, "the answer is no list")
            yield answer
            token = answer.get("metadata", {}).get("continue")
            if not token:
                return
            query["continue"] = token

    async def _call(
        self, call: Call, namespace: str | None, name: str | None, body: Object | None = None,
        query: Mapping[str, str] | None = None, accept: str = "application/json",
    ) -> Object:  # fmt: skip
        async with self._request(call, namespace, name, body, query, accept) as response:
            text = await response.text(errors="replace")
        if response.status >= 400:
            raise _error(call, name or "", response, text)
        return _object(call, name or "", response.status, text)

    @contextlib.asynccontextmanager
    async def _request(
        self, call: Call, namespace: str | None, name: str | None, body: Object | None = None,
        query: Mapping[str, str] | None = None, accept: str = "application/json",
    ) -> AsyncIterator[aiohttp.ClientResponse]:  # fmt: skip
        path = call.resource.path(namespace, name if call.verb in ("get", "update", "delete") else None)
        started, code = time.monotonic(), "error"
        try:
            session, connection = await self._connected()
            async with session.request(
                METHODS[call.verb], connection.server.rstrip("/") + path, params=query, json=body,
                headers={**connection.as_http_headers(), "Accept": accept},
            ) as response:  # fmt: skip
                code = str(response.status)
                self._dated(response.headers.get("Date", ""), time.monotonic() - started)
                yield response
        finally:
            self._observe(call, code, time.monotonic() - started)

    async def _connected(self) -> tuple[aiohttp.ClientSession, Connection]:
        async with self._connecting:  # many may ask at once, and one session is enough
            if self._connection is None or time.monotonic() - self._read_at > CREDENTIALS_SECONDS:
                # Reads small files: the token of a service account, or a kubeconfig.
                connection = self._login()
                if connection != self._connection or self._session is None:
                    await self.close()
                    self._session = await _session(connection)
                self._connection, self._read_at = connection, time.monotonic()
            assert self._session is not None
            return self._session, self._connection


async def _session(connection: Connection) -> aiohttp.ClientSession:
    secure = connection.server.startswith("https")
    context = await asyncio.to_thread(connection.as_ssl_context) if secure else False
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context), timeout=TIMEOUT)


async def _absent_is_none(answer: Awaitable[Object]) -> Object | None:
    try:
        return await answer
    except NotFound:
        return None


def _selector(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in labels.items())


def _items(page: Object) -> list[Object]:
    """An empty list of metadata is null."""
    return page["items"] or []


def _told(event: Object, versions: Versions) -> bool:
    """Whether a watch has now told all that there is to tell."""
    metadata = event["object"]["metadata"]
    if event["type"] == "DELETED":
        versions.found.pop(metadata["uid"], None)
    elif event["type"] != "BOOKMARK":
        versions.found[metadata["uid"]] = metadata["resourceVersion"]
    versions.at = metadata["resourceVersion"]
    return bool(event["type"] == "BOOKMARK")


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """However long they are: aiohttp's own end at 128 KiB."""
    left = b""
    async for chunk in response.content.iter_any():
        *whole, left = (left + chunk).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")


def _error(call: Call, name: str, response: aiohttp.ClientResponse, text: str) -> ApiError:
    kind = {404: NotFound, 409: Conflict}.get(response.status, ApiError)
    wait = response.headers.get("Retry-After", "")
    seconds = min(float(wait), LONGEST_WAIT_SECONDS) if wait.isdecimal() else None
    return kind(call, name, response.status, _message(text), seconds)


def _object(call: Call, name: str, status: int, text: str) -> Object:
    """Raises ApiError of what is no object: a proxy or a portal between answers in the API server's place."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ApiError(call, name, status, f"the answer is no object: {_message(text)}")
    return found


def _message(text: str) -> str:
    """A Status' message, or the first line of whatever a proxy said."""
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return (text.strip().splitlines() or ["no message"])[0][:200]
