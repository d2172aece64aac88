"""What the watches have delivered, by run: a look reads this, and not the API server.

It may lag behind, and a watch may be dead. So it tells whether there is anything to do, and what a run starts or takes for
ended is read anew before (:mod:`controller.operator.reconciler`). What we write ourselves is in it at once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from controller.api import meta
from controller.kube.api import Api
from controller.kube.resources import PODS, RUNS, WATCHED, Resource
from controller.projection import pack, unpack

Object = dict[str, Any]

GONE_KEPT = 4096
"""Deletions that are remembered: an answer to what we wrote before may come after them, and must not bring anything back."""


class Key(NamedTuple):
    """A run."""

    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class Record:
    version: str
    run: Key | None
    """That it is, or belongs to."""
    body: bytes


class Shelf:
    """All objects of one kind, by UID."""

    def __init__(self, resource: Resource) -> None:
        self.resource = resource
        self.records: dict[str, Record] = {}
        self._of_run: dict[Key | None, set[str]] = {}
        self._gone: dict[str, str] = {}

    def put(self, document: Mapping[str, Any]) -> bool:
        """Whether it is news: newer than what is here, and different in what anybody reads."""
        uid, version = document["metadata"]["uid"], document["metadata"]["resourceVersion"]
        before = self.records.get(uid)
        if not is_newer(version, before.version if before else self._gone.get(uid)):
            return False
        record = Record(version, run_of(self.resource, document), pack(self.resource, dict(document)))
        if before is not None and before.run != record.run:
            self._leave(uid, before)
        self.records[uid] = record
        self._of_run.setdefault(record.run, set()).add(uid)
        return before is None or (before.run, before.body) != (record.run, record.body)

    def remove(self, uid: str, version: str) -> Record | None:
        """What was here of an object that is gone."""
        self._gone[uid] = version
        if len(self._gone) > GONE_KEPT:
            del self._gone[next(iter(self._gone))]
        found = self.records.pop(uid, None)
        if found is not None:
            self._leave(uid, found)
        return found

    def of(self, run: Key) -> list[Object]:
        """In the order of their names, as the API server lists them."""
        found = [self._read(self.records[uid]) for uid in self._of_run.get(run, ())]
        return sorted(found, key=lambda document: str(document["metadata"]["name"]))

    def version(self, uid: str) -> str | None:
        """The newest that has been seen; None of what has not been seen, or is gone."""
        found = self.records.get(uid)
        return found.version if found else None

    def has_seen(self, uid: str, version: str) -> bool:
        """This version, a later one, or the end."""
        found = self.version(uid)
        return uid in self._gone or (found is not None and not is_newer(version, found))

    def _read(self, record: Record) -> Object:
        document = unpack(record.body)
        document["metadata"]["resourceVersion"] = record.version
        return document

    def _leave(self, uid: str, record: Record) -> None:
        there = self._of_run[record.run]
        there.discard(uid)
        if not there:
            del self._of_run[record.run]


def is_newer(version: str, than: str | None) -> bool:
    """The API server counts writes. One whose versions are no numbers is taken at its word, in the order in which it speaks."""
    if than is None or not (version.isdigit() and than.isdigit()):
        return version != than
    return int(version) > int(than)


def run_of(resource: Resource, document: Mapping[str, Any]) -> Key | None:
    """The run that an object is, or belongs to."""
    metadata = document["metadata"]
    name = metadata["name"] if resource == RUNS else (metadata.get("labels") or {}).get(meta.LABEL_RUN)
    return Key(metadata["namespace"], name) if name else None


class Reads(Protocol):
    """Where what belongs to a run is read."""

    async def list_jobs(self, kind: Resource, namespace: str, labels: Mapping[str, str]) -> list[Object]: ...

    async def get_job(self, kind: Resource, namespace: str, name: str) -> Object | None: ...

    async def list_pods(self, namespace: str, labels: Mapping[str, str]) -> list[Object]: ...

    async def list_made(self, namespace: str, labels: Mapping[str, str]) -> list[Object]:
        """Pods by labels of their controller's, where some are missing that should have ours: of these no watch tells."""


class Memory:
    """Reads as :class:`Api` does, of what is kept."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.shelves = {resource: Shelf(resource) for resource in WATCHED}

    def event(self, resource: Resource, kind: str | None, document: Mapping[str, Any]) -> Key | None:
        """The run that wants a look because of what a watch says; None if that is no news, or about no run."""
        shelf, metadata = self.shelves[resource], document["metadata"]
        if kind == "DELETED":
            found = shelf.remove(metadata["uid"], metadata["resourceVersion"])
            return found.run if found else None
        return run_of(resource, document) if shelf.put(document) else None

    def saw(self, resource: Resource, documents: Iterable[Object]) -> None:
        """What was read or written meanwhile: when the watch tells of it, it is no news."""
        for document in documents:
            self.shelves[resource].put(document)

    def run(self, key: Key) -> Object | None:
        """The youngest, where one of the same name was there before."""
        found = self.shelves[RUNS].of(key)
        return max(found, key=lambda run: str(run["metadata"].get("creationTimestamp")), default=None)

    async def list_jobs(self, kind: Resource, namespace: str, labels: Mapping[str, str]) -> list[Object]:
        return self.shelves[kind].of(Key(namespace, labels[meta.LABEL_RUN]))

    async def list_pods(self, namespace: str, labels: Mapping[str, str]) -> list[Object]:
        return self.shelves[PODS].of(Key(namespace, labels[meta.LABEL_RUN]))

    async def list_made(self, namespace: str, labels: Mapping[str, str]) -> list[Object]:
        return await self.api.list_pods(namespace, labels)

    async def get_job(self, kind: Resource, namespace: str, name: str) -> Object | None:
        """Asked for where a job is not among those of its run: then nothing but the truth helps."""
        return await self.api.get_job(kind, namespace, name)


class Anew:
    """Reads the API server, and has it remembered."""

    def __init__(self, api: Api, memory: Memory) -> None:
        self.api = api
        self.memory = memory

    async def list_jobs(self, kind: Resource, namespace: str, labels: Mapping[str, str]) -> list[Object]:
        found = await self.api.list_jobs(kind, namespace, labels)
        self.memory.saw(kind, found)
        return found

    async def list_pods(self, namespace: str, labels: Mapping[str, str]) -> list[Object]:
        found = await self.api.list_pods(namespace, labels)
        self.memory.saw(PODS, found)
        return found

    async def get_job(self, kind: Resource, namespace: str, name: str) -> Object | None:
        return await self.api.get_job(kind, namespace, name)

    async def list_made(self, namespace: str, labels: Mapping[str, str]) -> list[Object]:
        return await self.api.list_pods(namespace, labels)
