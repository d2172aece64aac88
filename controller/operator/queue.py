"""Which runs want a look: each at most once in the queue, never two looks at one run at a time, namespaces in turn.

Two lines: of what has happened, and of looks that time brings, mostly for the progress of what trains. A thousand of these
may come at once, and a job that has ended does not stand behind them. Nor does it meet the API server busy with their writes:
they begin evenly. Runs that were started together came up together in each minute, and for ten seconds of it, with sixty
status writes a second, the next job of a run took 0.3 to 0.8 s where it takes 0.05.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable

from controller.memory import Key

FIRST_RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 120.0
DUE_AT_ONCE = 4
"""Looks that time has brought, at most; one of them has its place always, so that they go on whatever happens."""
DUE_PER_SECOND = 25.0
"""At most; somewhat more than the reconciler asks for, so that they do not pile up."""


class Line:
    """Keys in the order of their arrival, namespaces in turn."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[Key, float]] = {}
        """By namespace, in the order of their turns; with the time of arrival."""

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __contains__(self, key: Key) -> bool:
        return key in self._waiting.get(key.namespace, ())

    def add(self, key: Key, now: float) -> None:
        self._waiting.setdefault(key.namespace, {}).setdefault(key, now)

    def discard(self, key: Key) -> None:
        of_namespace = self._waiting.get(key.namespace, {})
        of_namespace.pop(key, None)
        if not of_namespace:
            self._waiting.pop(key.namespace, None)

    def pop(self) -> tuple[Key, float]:
        """The longest there of the namespace whose turn it is: ten thousand runs of one do not keep another waiting."""
        namespace = next(iter(self._waiting))
        of_namespace = self._waiting.pop(namespace)
        key = next(iter(of_namespace))
        since = of_namespace.pop(key)
        if of_namespace:
            self._waiting[namespace] = of_namespace
        return key, since


class WorkQueue:
    """As the work queue of Go's controllers: a key that is added while it is being worked on comes up again afterwards."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._news, self._due = Line(), Line()
        self._working: dict[Key, Line] = {}
        """With the line that each came from."""
        self._again: dict[Key, Line] = {}
        self._timers: dict[Key, tuple[asyncio.TimerHandle, Line]] = {}
        self._failures: dict[Key, int] = {}
        self._changed = asyncio.Event()
        self._next_due = -math.inf
        """When the next look that time has brought may begin."""

    def __len__(self) -> int:
        return len(self._news) + len(self._due)

    def add(self, key: Key) -> None:
        """Something has happened."""
        self._add(key, self._news)

    def add_due(self, key: Key) -> None:
        """It is time, and no more."""
        self._add(key, self._due)

    def add_after(self, key: Key, seconds: float) -> None:
        """It is due then, unless it is sooner anyway."""
        self._add_after(key, seconds, self._due)

    def retry(self, key: Key, at_least: float = 0.0) -> float:
        """Add it after a wait that doubles with each failure in a row. Returns the wait."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        wait = min(FIRST_RETRY_SECONDS * 2.0 ** min(failures - 1, 16), LONGEST_RETRY_SECONDS)
        self._add_after(key, max(wait, at_least), self._news)
        return max(wait, at_least)

    def forget_failures(self, key: Key) -> None:
        self._failures.pop(key, None)

    async def get(self) -> tuple[Key, float]:
        """A key, and for how many seconds it has waited. Call :meth:`done` after it has been worked on."""
        while (line := self._next()) is None:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._until_due())
        key, since = line.pop()
        self._working[key] = line
        if line is self._due:
            self._next_due = self._clock() + 1 / DUE_PER_SECOND
        return key, self._clock() - since

    def done(self, key: Key) -> None:
        self._working.pop(key, None)
        self._changed.set()
        if (line := self._again.pop(key, None)) is not None:
            self._add(key, line)

    def _next(self) -> Line | None:
        if self._has_place() and self._clock() >= self._next_due:
            return self._due
        return self._news if self._news else None

    def _has_place(self) -> bool:
        """Whether there is a look that is due, and place for it."""
        going = sum(line is self._due for line in self._working.values())
        return bool(self._due) and going < (1 if self._news else DUE_AT_ONCE)

    def _until_due(self) -> float | None:
        return self._next_due - self._clock() if self._has_place() else None

    def _add(self, key: Key, line: Line) -> None:
        if key in self._working:
            if self._again.get(key) is not self._news:
                self._again[key] = line
        elif key not in self._news:
            if line is self._news:
                self._due.discard(key)
            line.add(key, self._clock())
            self._changed.set()

    def _add_after(self, key: Key, seconds: float, line: Line) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + max(seconds, 0.0)
        if key in self._timers:
            timer, known = self._timers[key]
            due, line = min(due, timer.when()), self._news if known is self._news else line
            timer.cancel()
        self._timers[key] = loop.call_at(due, self._ring, key), line

    def _ring(self, key: Key) -> None:
        _, line = self._timers.pop(key)
        self._add(key, line)
