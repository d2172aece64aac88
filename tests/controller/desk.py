"""A run at which the reconciler looks, with an API server and a backend that only remember what they were told."""

import asyncio
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from builders import START, after, document, make_run, sft

from controller.api.run import AlignmentRun
from controller.api.status import RunStatus
from controller.api.workspace import Workspace
from controller.backends.cluster.backend import begun_with
from controller.kube.answers import ApiError, Conflict, NotFound
from controller.kube.calls import Call
from controller.kube.resources import RUNS
from controller.memory import Key, Memory
from controller.operator.defaults import Defaults
from controller.operator.meter import OperatorMetrics
from controller.operator.reconciler import NONE, Reconciler
from controller.plan.job import PhaseJob
from controller.plan.observed import Observed, ObservedJob
from controller.plan.place import folder_of

KEY = Key("ns", "test")
RUN = make_run(sft("base"))


@dataclass
class Server:
    stored: dict[str, Any] | None
    said: list[str] = field(default_factory=list)
    refusal: ApiError | None = None
    undeletable: ApiError | None = None
    events: list[str] = field(default_factory=list)

    async def get_run(self, namespace: str, name: str) -> dict[str, Any] | None:
        return self.stored

    async def write_run_status(self, run: dict[str, Any], status: dict[str, Any]) -> dict[str, Any]:
        if self.refusal is not None:
            raise self.refusal
        if self.stored is None:
            raise NotFound(Call("update", RUNS), "test", 404, "not found")
        if run["metadata"]["resourceVersion"] != self.stored["metadata"]["resourceVersion"]:
            raise Conflict(Call("update", RUNS), "test", 409, "modified")
        self.said.append("status")
        return self.store(status=status)

    def store(self, **changes: Any) -> dict[str, Any]:
        """As the API server: with each write a new version."""
        assert self.stored is not None
        metadata = {**self.stored["metadata"], **changes.pop("metadata", {})}
        version = str(int(metadata["resourceVersion"]) + 1)
        self.stored = {**self.stored, **changes, "metadata": {**metadata, "resourceVersion": version}}
        return self.stored

    async def delete_run(self, namespace: str, name: str, uid: str, version: str) -> None:
        self.said.append(f"delete {name} {uid} {version}")
        if self.undeletable is not None:
            raise self.undeletable

    async def create_event(self, event: dict[str, Any]) -> None:
        self.events.append(event["reason"])
        raise ApiError(Call("create", RUNS), "event", 403, "events may not be written here")


@dataclass
class Backend:
    server: Server
    view: Observed = field(default_factory=Observed)
    looks: int = 0
    anew: int = 0
    """How many of them asked the API server."""
    words: int = 0
    """How many of the others asked queues."""
    lost: bool = False
    queues: list[str | None] = field(default_factory=list)
    workspaces: list[Workspace | None] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)

    async def observe(self, run: AlignmentRun, anew: bool = True, words: bool = True) -> Observed:
        self.looks += not anew
        self.anew += anew
        self.words += words and not anew
        return self.view

    async def apply(self, run: AlignmentRun, job: PhaseJob) -> None:
        self.server.said.append(f"apply {job.phase}-{job.attempt}")
        self.queues.append(job.queue_name)
        self.workspaces.append(job.workspace)
        self.images.append(begun_with(run, job))
        self.folders.append(folder_of(run))

    async def delete(self, run: AlignmentRun, phase: str, attempt: int, seen: ObservedJob | None) -> None:
        if self.lost:
            raise TimeoutError
        self.server.said.append(f"delete {phase}-{attempt}")

    async def reclaim(self, run: AlignmentRun, seen: ObservedJob) -> None:
        self.server.said.append(f"reclaim {seen.phase}-{seen.attempt}")


class Desk:
    """A run, and looks at it."""

    def __init__(self, defaults: Defaults = NONE, **spec: Any) -> None:
        stored = document(sft("base"), **spec)
        stored["metadata"] |= {"namespace": "ns", "uid": "u", "generation": 1, "resourceVersion": "1"}
        self.server = Server(stored)
        self.backend = Backend(self.server)
        self.now = START
        self.watched = True
        api: Any = self.server  # as much of it as is asked for
        self.memory = Memory(api)
        self.reconciler = Reconciler(
            api, self.memory, self.backend, OperatorMetrics(), "me", now=self.clock, defaults=defaults
        )

    def clock(self) -> datetime:
        return self.now

    def look(self, view: Observed | None = None, at: float = 0) -> timedelta | None:
        self.now, self.backend.view = after(at), view or self.backend.view
        if self.watched:
            self.watch()
        return asyncio.run(self.reconciler.look(KEY))

    def watch(self) -> None:
        """The watch delivers what is there."""
        found = self.server.stored
        gone = {"metadata": {"uid": "u", "resourceVersion": "999", "namespace": "ns", "name": "test"}}
        self.memory.event(RUNS, "MODIFIED" if found else "DELETED", found or gone)

    def edit(self, **spec: Any) -> None:
        assert self.server.stored is not None
        generation = self.server.stored["metadata"]["generation"] + 1
        self.server.store(metadata={"generation": generation}, spec={**self.server.stored["spec"], **spec})

    @property
    def status(self) -> RunStatus:
        assert self.server.stored is not None
        return RunStatus.model_validate(self.server.stored.get("status", {}))
