"""Which runs want a look: each at most once in the queue, never two looks at one run at a time, namespaces in turn."""

import asyncio
import time
from collections.abc import Callable

from controller.memory import Key

FIRST_RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 120.0


class WorkQueue:
    """As the work queue of Go's controllers: a key that is added while it is being worked on comes up again afterwards."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[str, dict[Key, float]] = {}
        """By namespace, in the order of their turns: keys in order of arrival, with the time of it."""
        self._working: set[Key] = set()
        self._again: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._failures: dict[Key, int] = {}
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, key: Key) -> None:
        if key in self._working:
            self._again.add(key)
        else:
            self._waiting.setdefault(key.namespace, {}).setdefault(key, self._clock())
            self._arrived.set()

    def add_after(self, key: Key, seconds: float) -> None:
        """Add it then, unless it is to be added sooner anyway."""
        loop = asyncio.get_running_loop()
        due = loop.time() + max(seconds, 0.0)
        timer = self._timers.get(key)
        if timer is not None and timer.when() <= due:
            return
        if timer is not None:
            timer.cancel()
        self._timers[key] = loop.call_at(due, self._ring, key)

    def retry(self, key: Key, at_least: float = 0.0) -> float:
        """Add it after a wait that doubles with each failure in a row. Returns the wait."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        wait = min(FIRST_RETRY_SECONDS * 2.0 ** min(failures - 1, 16), LONGEST_RETRY_SECONDS)
        self.add_after(key, max(wait, at_least))
        return max(wait, at_least)

    def forget_failures(self, key: Key) -> None:
        self._failures.pop(key, None)

    async def get(self) -> tuple[Key, float]:
        """A key, and for how many seconds it has waited. Call :meth:`done` after it has been worked on.

        The one that has waited longest of the namespace whose turn it is: ten thousand runs of one do not keep another waiting.
        """
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        namespace = next(iter(self._waiting))
        of_namespace = self._waiting.pop(namespace)
        key = next(iter(of_namespace))
        since = of_namespace.pop(key)
        if of_namespace:
            self._waiting[namespace] = of_namespace
        self._working.add(key)
        return key, self._clock() - since

    def done(self, key: Key) -> None:
        self._working.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def _ring(self, key: Key) -> None:
        self._timers.pop(key, None)
        self.add(key)
