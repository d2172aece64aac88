"""Whether the watches still live. A watch can die without an error, and then nothing is reconciled while all looks well.

Every so often the objects' versions are listed and compared with what the watches have delivered. An object that has
changed before the last comparison and of which the watch has said nothing since means that the watch is dead.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import aiohttp

from controller.kube import Api, ApiError, Resource
from controller.operator.namespaces import FORBIDDEN

logger = logging.getLogger(__name__)

EVERY_SECONDS = 60.0


@dataclass
class Watch:
    resource: Resource
    labels: dict[str, str] = field(default_factory=dict)
    seen: dict[str, str] = field(default_factory=dict)
    """uid to the resource version that the watch delivered last."""
    overdue: dict[str, str | None] = field(default_factory=dict)
    """uid to what had been seen of it when a newer version was listed."""

    def event(self, kind: str | None, uid: str, version: str) -> None:
        if kind == "DELETED":
            self.seen.pop(uid, None)
        else:
            self.seen[uid] = version

    def compare(self, listed: dict[str, str]) -> bool:
        """Whether the watch lives: of everything that was overdue last time and still exists, it has said something since."""
        silent = [uid for uid, before in self.overdue.items() if uid in listed and self.seen.get(uid) == before]
        dead = any(listed[uid] != self.seen.get(uid) for uid in silent)
        self.overdue = {uid: self.seen.get(uid) for uid, version in listed.items() if self.seen.get(uid) != version}
        return not dead


class Watchdog:
    def __init__(
        self, api: Api, watches: Sequence[Watch], namespaces: Sequence[str | None], every: float = EVERY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        told: Callable[[Iterable[str], Iterable[str]], None] = lambda watches, dead: None,
    ) -> None:  # fmt: skip
        """``told`` is called with all watches and the dead ones after each comparison."""
        self.api = api
        self.watches = {watch.resource.plural: watch for watch in watches}
        self.namespaces = namespaces
        self.every = every
        self._clock = clock
        self._told = told
        told(self.watches, ())
        self.dead: tuple[str, ...] = ()
        """Watches that deliver nothing any more."""

    def event(self, resource: str, kind: str | None, uid: str, version: str) -> None:
        self.watches[resource].event(kind, uid, version)

    async def guard(self) -> None:
        """Compare for ever."""
        while True:
            await asyncio.sleep(self.every)
            try:
                self.dead = tuple([w.resource.plural for w in self.watches.values() if not await self._lives(w)])
            except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
                # The API server is away: the watches cannot be blamed for that.
                logger.warning("the watches could not be checked: %s", str(error) or type(error).__name__)
                continue
            self._told(self.watches, self.dead)
            if self.dead:
                logger.error("watches are dead: %s", ", ".join(self.dead))

    async def _lives(self, watch: Watch) -> bool:
        listed: dict[str, str] = {}
        for namespace in self.namespaces:
            listed |= await self._listed(watch, namespace)
        return watch.compare(listed)

    async def _listed(self, watch: Watch, namespace: str | None) -> dict[str, str]:
        try:
            return await self.api.list_versions(watch.resource, namespace, watch.labels)
        except ApiError as error:
            if namespace is None or error.status != FORBIDDEN:
                raise
            # Deleted, and the operator's Role with it: what is in the others is looked at all the same.
            logger.warning(
                "the watch of %s in namespace %s is not checked: %s", watch.resource.plural, namespace, error
            )
            return {}
