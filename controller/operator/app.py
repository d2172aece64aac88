"""The operator process: kopf's watches fill a queue, workers look at runs, a Lease says who acts."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import aiohttp
import kopf

from controller.api import meta
from controller.backends.cluster import kinds
from controller.backends.cluster.backend import ClusterBackend
from controller.backends.cluster.scrape import Scraper
from controller.backends.cluster.settings import Settings
from controller.clock import Clock
from controller.kube.answers import ApiError, Conflict
from controller.kube.api import Api
from controller.kube.changes import Changes
from controller.kube.resources import PODS, RUNS, WATCHED, Resource
from controller.kube.transport import Transport
from controller.memory import Key, Memory
from controller.operator import handlers, health
from controller.operator.defaults import Defaults
from controller.operator.lease import LeaderElection, LeadershipLost, LeaseTimes
from controller.operator.login import Login
from controller.operator.meter import OperatorMetrics
from controller.operator.model_configs import ModelConfigs
from controller.operator.namespaces import FORBIDDEN, NamespaceIsBack, readable, until_back
from controller.operator.queue import WorkQueue
from controller.operator.reconciler import POLL, Reconciler
from controller.operator.watchdog import EVERY_SECONDS, Watch, Watchdog

logger = logging.getLogger(__name__)

INSTALL = {
    RUNS: "apply manifests/base/crd.yaml",
    **{resource: f"install {kind.INSTALL}" for kind in kinds.KINDS.values() for resource in kind.MAKERS.values()},
    PODS: "this is no Kubernetes",
}
MISSING_SECONDS = 5.0
OTHERS_SECONDS = 30.0
"""Between two questions for a kind of job that is not the default and was not there at the start."""
GONE_SECONDS = 10
"""After a run has been deleted it is looked for so long whether its kind goes, too."""

OURS = {meta.LABEL_MANAGED_BY: meta.PRODUCT}


@dataclass(frozen=True)
class Options:
    identity: str
    """Unique among the replicas."""
    lease_namespace: str
    namespaces: tuple[str, ...] = ()
    """Those that are watched; all unless set."""
    pods: Settings = field(default_factory=Settings)
    defaults: Defaults = field(default_factory=Defaults)
    port: int = 8080
    workers: int = 16
    """Runs that are looked at side by side."""
    poll: timedelta = POLL
    lease: LeaseTimes = field(default_factory=LeaseTimes)
    watchdog_seconds: float = EVERY_SECONDS


class KindIsServed(Exception):
    """A kind of job that was not there at the start of the process, when watches begin."""


class Operator:
    def __init__(self, options: Options, login: Login) -> None:
        self.options = options
        self.login = login
        self.metrics = OperatorMetrics()
        self.clock = Clock()
        self.metrics.clock(lambda: self.clock.ahead)
        self.transport = Transport(login, self.metrics.called, self.clock.dated)
        self.api = Api(self.transport)
        self.queue = WorkQueue()
        self.metrics.queue(self.queue)
        self.scraper = Scraper(
            every=options.poll.total_seconds(),
            begun=lambda namespace, run: self.queue.add_due(Key(namespace, run)),
            told=self.metrics.scraped,
            now=self.clock.now,
        )
        self.memory = Memory(self.api)
        self.backend = ClusterBackend(self.api, self.memory, self.scraper, options.pods, self.clock.now)
        self.configs = ModelConfigs(self.queue.add)
        self.reconciler = Reconciler(
            self.api, self.memory, self.backend, self.metrics, options.identity, options.poll, self.clock.now,
            defaults=options.defaults, configs=self.configs.of,
        )  # fmt: skip
        self.election = LeaderElection(self.api, options.lease_namespace, options.identity, options.lease)
        watches = [Watch(shelf, {} if resource == RUNS else OURS) for resource, shelf in self.memory.shelves.items()]
        self.watchdog = Watchdog(
            Changes(self.transport), watches, options.namespaces or (None,), options.watchdog_seconds, told=self.metrics.watches,
            look_again=self.queue.add,
        )  # fmt: skip
        self._default = kinds.KINDS[options.defaults.backend]
        self.served = asyncio.Event()
        """It is known which kinds there are."""
        self.watching = asyncio.Event()
        self._run_is_gone = asyncio.Event()
        self.missing: str | None = None
        """A kind that is not installed, and has to be."""
        self.port = 0

    async def run(self) -> None:
        """Until SIGTERM, or until something that must go on ends. Raises LeadershipLost, NamespaceIsBack, KindIsServed."""
        server, self.port = await health.serve(self.options.port, self._unhealthy, self._unready, self.metrics.page)
        tasks: list[asyncio.Task[None]] = []
        try:
            namespaces = await readable(self.api, self.options.namespaces)
            self.watchdog.namespaces = namespaces or (None,)
            absent = [namespace for namespace in self.options.namespaces if namespace not in namespaces]
            works = (
                self._watch(namespaces), self._act(), self.watchdog.guard(), until_back(self.api, absent),
                self._until_others_are_served(namespaces[0] if namespaces else None),
                self._until_defined_anew(namespaces[0] if namespaces else None),
            )  # fmt: skip
            tasks = [asyncio.create_task(work) for work in works]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.election.release()
            await asyncio.gather(server.cleanup(), self.scraper.close(), self.transport.close(), self.configs.close())

    # -- what is watched

    async def _watch(self, namespaces: Sequence[str]) -> None:
        """Ends on SIGTERM, which kopf listens for."""
        namespace = namespaces[0] if namespaces else None
        await self._until_served(namespace)
        await self._leave_out_absent(namespace)
        self.served.set()
        await kopf.operator(
            registry=handlers.registry([r for r in WATCHED if r not in self.backend.absent], self._notify, self.login),
            settings=handlers.settings(),
            clusterwide=not namespaces,
            namespaces=namespaces,
            ready_flag=self.watching,
            standalone=True,
        )

    async def _until_served(self, namespace: str | None) -> None:
        """kopf looks for kinds at its start only; those that are installed later would never be watched."""
        for resource in (RUNS, *self._default.MAKERS.values(), PODS):
            while not await self.api.serves(resource, namespace):
                self.missing = f"the cluster has no {resource.plural}.{resource.group}: {INSTALL[resource]}"
                logger.warning("%s", self.missing)
                await asyncio.sleep(MISSING_SECONDS)
        self.missing = None

    async def _leave_out_absent(self, namespace: str | None) -> None:
        """Kinds of job that are not the default need not be there; what runs ask for them is told so."""
        others = [resource for kind in kinds.KINDS.values() for resource in kind.MAKERS.values()]
        absent = {resource for resource in others if not await self._may_be_read(resource, namespace)}
        self.backend.absent = frozenset(absent)
        self.watchdog.leave_out(absent)
        for resource in absent:
            logger.info(
                "the cluster has no %s.%s that may be read: no run can have them", resource.plural, resource.group
            )

    async def _may_be_read(self, resource: Resource, namespace: str | None) -> bool:
        try:
            return await self.api.serves(resource, namespace)
        except ApiError as error:
            if error.status != FORBIDDEN:
                raise
            return False

    async def _until_others_are_served(self, namespace: str | None) -> None:
        """Raises KindIsServed."""
        await self.served.wait()
        while True:
            await asyncio.sleep(OTHERS_SECONDS)
            for resource in self.backend.absent:
                with contextlib.suppress(ApiError, aiohttp.ClientError, TimeoutError, OSError):
                    if await self.api.serves(resource, namespace):
                        raise KindIsServed(f"{resource.plural}.{resource.group}")

    async def _until_defined_anew(self, namespace: str | None) -> None:
        """Raises KindIsServed: for kopf a watch of a kind that was deleted is over for good."""
        await self.served.wait()
        while True:
            # With their kind all runs go, of which the watch tells before it ends. Where there was none it takes longer.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._run_is_gone.wait(), OTHERS_SECONDS)
            times = GONE_SECONDS if self._run_is_gone.is_set() else 1
            self._run_is_gone.clear()
            for _ in range(times):
                with contextlib.suppress(ApiError, aiohttp.ClientError, TimeoutError, OSError):
                    if not await self.api.serves(RUNS, namespace):
                        await self._until_served(namespace)
                        raise KindIsServed(f"{RUNS.plural}.{RUNS.group}")
                await asyncio.sleep(1)

    def _notify(self, resource: Resource, kind: str | None, document: Mapping[str, Any]) -> None:
        self.metrics.watched(resource.plural)
        if resource == RUNS and kind == "DELETED":
            self._run_is_gone.set()
        key = self.memory.event(resource, kind, document)
        if key is not None:
            self.queue.add(key)

    def _unhealthy(self) -> str | None:
        return f"watches are dead: {', '.join(self.watchdog.dead)}" if self.watchdog.dead else None

    def _unready(self) -> str | None:
        return self.missing or (None if self.watching.is_set() else "the watches have not begun")

    # -- what is done

    async def _act(self) -> None:
        """A replica that does not hold the lease only watches, so that it can go on at once."""
        self.metrics.leads(False)
        await self.election.acquire()
        self.metrics.leads(True)
        # Without this a look right after the start would find running jobs without their pods, and say so.
        known = asyncio.create_task(self._know())
        workers = [asyncio.create_task(self._work(known)) for _ in range(self.options.workers)]
        try:
            await self.election.hold()
        finally:
            self.metrics.leads(False)
            for task in (known, *workers):
                task.cancel()
            await asyncio.gather(known, *workers, return_exceptions=True)

    async def _know(self) -> None:
        await self.served.wait()
        await self.watchdog.until_known([resource for resource in self.watchdog.watches if resource != RUNS])

    async def _work(self, known: asyncio.Task[None]) -> None:
        await asyncio.shield(known)
        while True:
            key, waited = await self.queue.get()
            self.metrics.waited(waited)
            try:
                await self._look(key)
            finally:
                self.queue.done(key)

    async def _look(self, key: Key) -> None:
        started, outcome = time.monotonic(), "ok"
        try:
            again = await self.reconciler.look(key)
            self.queue.forget_failures(key)
            if again is not None:
                self.queue.add_after(key, again.total_seconds())
        except Conflict as error:
            # Someone has edited the run meanwhile; what was decided may be wrong now.
            outcome = "conflict"
            logger.debug("%s/%s: %s", *key, error)
            self.queue.retry(key)
        except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
            outcome = "api"
            wait = self.queue.retry(key, getattr(error, "retry_after", None) or 0.0)
            logger.warning("%s/%s: %s; again in %.1f s", *key, str(error) or type(error).__name__, wait)
        except Exception:  # a bug met with one run must not stop the others
            outcome = "bug"
            logger.exception("%s/%s: unexpected error; again in %.1f s", *key, self.queue.retry(key))
        finally:
            self.metrics.reconciled(outcome, time.monotonic() - started)


async def main(options: Options, login: Login) -> int:
    """The exit status of the process."""
    operator = Operator(options, login)
    with contextlib.suppress(asyncio.CancelledError):
        try:
            await operator.run()
        except LeadershipLost as error:
            logger.error("%s: ending, so that only one replica acts", error)
            return 1
        except NamespaceIsBack as error:
            logger.warning("namespace %s may be read now: ending, so that a new start watches it", error)
        except KindIsServed as kind:
            logger.warning("there are %s now: ending, so that a new start watches them", kind)
        except ApiError as error:
            logger.error("the API server refuses what the operator needs: %s", error)
            return 1
    return 0
