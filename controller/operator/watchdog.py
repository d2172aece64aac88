"""Whether the watches still live. A watch can die without an error, and then nothing is reconciled while all looks well.

Every so often the objects' versions are compared with what the watches have delivered. They are listed once; from then on a
short watch of another connection tells what has changed since the last comparison, and how far it has told: ten thousand
runs at rest cost nothing. If it cannot say that, they are listed anew. An object that has changed before the last comparison
and of which the watch has said nothing since means that the watch is dead. One that is remembered and was not there in two
comparisons is forgotten: kopf lists anew when it has lost its place, and does not tell of what is gone since.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import aiohttp

from controller.kube.answers import ApiError
from controller.kube.changes import Changes, Versions
from controller.kube.resources import Resource
from controller.memory import Key, Record, Shelf
from controller.operator.namespaces import FORBIDDEN

logger = logging.getLogger(__name__)

EVERY_SECONDS = 60.0
AT_ONCE = 32
"""Kinds and namespaces that are asked about side by side."""
STEP_SECONDS = 0.2
STEPS = 50
"""Between two lists, for the watches to tell what is in the first."""


@dataclass
class Watch:
    shelf: Shelf
    """What it has delivered."""
    labels: dict[str, str] = field(default_factory=dict)
    overdue: dict[str, str | None] = field(default_factory=dict)
    """uid to what had been seen of it when a newer version was listed."""
    absent: dict[str, str] = field(default_factory=dict)
    """uid to the version of what is remembered and was not listed."""
    there: dict[str | None, Versions] = field(default_factory=dict)
    """What there was at the last comparison, by namespace."""

    @property
    def resource(self) -> Resource:
        return self.shelf.resource

    def compare(self, listed: dict[str, str]) -> bool:
        """Whether the watch lives: of everything that was overdue last time and still exists, it has said something since."""
        seen = self.shelf.version
        silent = [uid for uid, before in self.overdue.items() if uid in listed and seen(uid) == before]
        dead = any(listed[uid] != seen(uid) for uid in silent)
        self.overdue = {uid: seen(uid) for uid, version in listed.items() if seen(uid) != version}
        return not dead

    def forget_absent(self, listed: dict[str, str]) -> list[Record]:
        """What is gone for good, of which the watch has not told."""
        absent = {uid: record.version for uid, record in self.shelf.records.items() if uid not in listed}
        ghosts = [uid for uid, version in absent.items() if self.absent.get(uid) == version]
        self.absent = absent
        return [found for uid in ghosts if (found := self.shelf.remove(uid, absent[uid]))]


class Watchdog:
    def __init__(
        self, changes: Changes, watches: Sequence[Watch], namespaces: Sequence[str | None], every: float = EVERY_SECONDS,
        told: Callable[[Iterable[str], Iterable[str]], None] = lambda watches, dead: None,
        look_again: Callable[[Key], None] = lambda key: None,
    ) -> None:  # fmt: skip
        """``told`` is called with all watches and the dead ones after each comparison."""
        self.changes = changes
        self.watches = {watch.resource: watch for watch in watches}
        self.namespaces = namespaces
        self.every = every
        self.look_again = look_again
        self._told = told
        self._places = asyncio.Semaphore(AT_ONCE)
        self.dead: tuple[str, ...] = ()
        """Watches that deliver nothing any more."""
        self._tell()

    def leave_out(self, resources: Collection[Resource]) -> None:
        """Kinds that are not there."""
        self.watches = {resource: watch for resource, watch in self.watches.items() if resource not in resources}
        self._tell()

    async def guard(self) -> None:
        """Compare for ever."""
        while True:
            await asyncio.sleep(self.every)
            try:
                watches = list(self.watches.values())
                alive = await asyncio.gather(*map(self._lives, watches))
                self.dead = tuple(w.resource.plural for w, lives in zip(watches, alive, strict=True) if not lives)
            except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
                # The API server is away: the watches cannot be blamed for that.
                logger.warning("the watches could not be checked: %s", str(error) or type(error).__name__)
                continue
            self._tell()
            if self.dead:
                logger.error("watches are dead: %s", ", ".join(self.dead))

    async def until_known(self, resources: Iterable[Resource]) -> None:
        """Return once the watches have delivered all that is there now."""
        for resource in resources:
            while not await self._becomes_known(self.watches[resource]):
                await asyncio.sleep(STEP_SECONDS)

    async def _becomes_known(self, watch: Watch) -> bool:
        """What is there now. Not within some time: it may be gone, of which nobody tells a watch that begins later."""
        try:
            left, _ = await self._list(watch)
        except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
            logger.warning("%s could not be listed: %s", watch.resource.plural, str(error) or type(error).__name__)
            return False
        for _ in range(STEPS):
            left = {uid: version for uid, version in left.items() if not watch.shelf.has_seen(uid, version)}
            if not left:
                return True
            await asyncio.sleep(STEP_SECONDS)
        return False

    async def _lives(self, watch: Watch) -> bool:
        listed, is_all = await self._list(watch)
        for record in watch.forget_absent(listed) if is_all else ():
            if record.run is not None:
                self.look_again(record.run)
        return watch.compare(listed)

    async def _list(self, watch: Watch) -> tuple[dict[str, str], bool]:
        """What there is, and whether all namespaces could be read."""
        found = await asyncio.gather(*(self._listed(watch, namespace) for namespace in self.namespaces))
        return {uid: version for one in found if one for uid, version in one.found.items()}, None not in found

    async def _listed(self, watch: Watch, namespace: str | None) -> Versions | None:
        try:
            async with self._places:
                return await self._seen(watch, namespace)
        except ApiError as error:
            if namespace is None or error.status != FORBIDDEN:
                raise
            # Deleted, and the operator's Role with it: what is in the others is looked at all the same.
            logger.warning(
                "the watch of %s in namespace %s is not checked: %s", watch.resource.plural, namespace, error
            )
            return None

    async def _seen(self, watch: Watch, namespace: str | None) -> Versions:
        # Taken out first: what has been brought up to now in part only would not be true of any moment.
        there = watch.there.pop(namespace, None)
        if there is None or not await self.changes.catch_up(watch.resource, namespace, watch.labels, there):
            there = await self.changes.list_versions(watch.resource, namespace, watch.labels)
        watch.there[namespace] = there
        return there

    def _tell(self) -> None:
        self._told([resource.plural for resource in self.watches], self.dead)
