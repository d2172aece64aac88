"""Which of several replicas acts: whoever holds the Lease (client-go's rules, in a few lines).

Clocks of machines differ, so a lease is over when its record has not changed for its duration as seen from here.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import aiohttp

from controller.api import meta
from controller.kube.answers import ApiError, Conflict
from controller.kube.api import Api

logger = logging.getLogger(__name__)

Object = dict[str, Any]


@dataclass(frozen=True)
class LeaseTimes:
    duration: float = 15.0
    """Seconds after which a silent holder has lost it."""
    renew_deadline: float = 10.0
    """Seconds without success after which the holder itself gives up; less than the duration, so that two never act."""
    retry: float = 2.0


class LeadershipLost(Exception):
    """The lease could not be renewed in time: someone else may act now, so this process has to end."""


class LeaderElection:
    def __init__(
        self, api: Api, namespace: str, identity: str, times: LeaseTimes | None = None, name: str = meta.PRODUCT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.api = api
        self.namespace = namespace
        self.name = name
        self.identity = identity
        self.times = times or LeaseTimes()
        self._clock = clock
        self._lease: Object | None = None
        self._written = ""
        """The time of our last renewal of which we know that it was taken."""
        self._record: tuple[object, object] = (None, None)
        self._changed_at = self._renewed_at = clock()

    async def acquire(self) -> None:
        """Return once this process holds the lease."""
        while not await self._safely_try():
            await asyncio.sleep(self.times.retry)
        logger.info("this replica acts: it holds lease %s/%s", self.namespace, self.name)

    async def hold(self) -> None:
        """Renew for ever. Raises LeadershipLost.

        Also if the lease is ours and has gone back in time, as all of the cluster has then: versions are counted anew, and
        what is remembered of it, and asked of the watches, is of a time that has not been.
        """
        try:
            while True:
                left = self._renewed_at + self.times.renew_deadline - self._clock()
                # Also an attempt on its way is over by then: its answer may take longer than the others wait.
                async with asyncio.timeout(left):
                    await self._renew()
        except TimeoutError:
            raise LeadershipLost(f"lease {self.namespace}/{self.name} was not renewed in time") from None

    async def release(self) -> None:
        """Let another replica take over at once."""
        if self._lease is not None and self._holder() == self.identity:
            try:
                await self.api.update_lease(self._with({"holderIdentity": "", "leaseDurationSeconds": 1}))
            except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                logger.warning("the lease could not be released: %s", error)

    async def _renew(self) -> None:
        """Once. Raises LeadershipLost if another one holds the lease."""
        await asyncio.sleep(self.times.retry)
        while not await self._safely_try():
            if self._held_by_another():
                raise LeadershipLost(f"lease {self.namespace}/{self.name} is held by {self._holder()}")
            await asyncio.sleep(self.times.retry)

    async def _safely_try(self) -> bool:
        # Others count from the write, which an answer may follow by seconds; so the begin is what counts here.
        began = self._clock()
        try:
            # Not wait_for, which may swallow a cancellation (python/cpython#86296): then nobody would give up in time.
            async with asyncio.timeout(self.times.renew_deadline / 2):
                held = await self._try()
            self._renewed_at = began if held else self._renewed_at
            return held
        except Conflict:
            return False
        except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
            logger.warning("lease %s/%s: %s", self.namespace, self.name, str(error) or type(error).__name__)
            return False

    async def _try(self) -> bool:
        """Take or renew the lease if nobody else holds it. The resource version decides a race."""
        self._lease = await self.api.get_lease(self.namespace, self.name)
        if self._lease is None:
            return self._took(await self.api.create_lease(self._new()))
        if not self._held_by_another() and self._renewed() < self._written:
            raise LeadershipLost(
                f"lease {self.namespace}/{self.name} is older than its last renewal: a backup was restored"
            )
        self._note()
        if self._held_by_another() and self._clock() - self._changed_at < self.times.duration:
            return False
        return self._took(await self.api.update_lease(self._with(self._mine())))

    def _took(self, lease: Object) -> bool:
        self._lease = lease
        self._written = self._renewed()
        return True

    def _renewed(self) -> str:
        """All such times are written alike, and so in the order of their letters."""
        return str(self._spec().get("renewTime") or "")

    def _note(self) -> None:
        spec = self._spec()
        record = (spec.get("holderIdentity"), spec.get("renewTime"))
        if record != self._record:
            self._record, self._changed_at = record, self._clock()

    def _held_by_another(self) -> bool:
        return self._holder() not in ("", self.identity)

    def _holder(self) -> str:
        return str(self._spec().get("holderIdentity") or "")

    def _spec(self) -> Object:
        return dict((self._lease or {}).get("spec") or {})

    def _mine(self) -> Object:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = self._spec()
        taken = self._holder() != self.identity
        return {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": int(self.times.duration),
            "renewTime": now,
            "acquireTime": now if taken else spec.get("acquireTime", now),
            "leaseTransitions": int(spec.get("leaseTransitions") or 0) + taken,
        }

    def _with(self, changes: Object) -> Object:
        lease = self._lease or {}
        return {**lease, "spec": {**self._spec(), **changes}}

    def _new(self) -> Object:
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"namespace": self.namespace, "name": self.name},
            "spec": self._mine(),
        }
