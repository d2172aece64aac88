"""Runs that do nothing but wait for their queue, and when each asks what the queue says.

That a job is let go, or taken back, its watch tells at once: what is asked for are words (no quota, no such queue). Looked at
as those that train, nine thousand that wait took nine of ten looks, and the progress of a thousand that train was looked at
every eight minutes.
"""

import math
import time
from collections.abc import Callable
from datetime import timedelta

from controller.memory import Key

WORDS_PER_SECOND = 4.0
"""At most, of all runs together, once they have waited for a while."""
LONGER_EACH_TIME = 3.0
"""One that is new asks after 15, 60, 240 seconds until its turn in the crowd is sooner: no such queue is an early word."""


class InLine:
    def __init__(self, first: timedelta, clock: Callable[[], float] = time.monotonic) -> None:
        self._first = first.total_seconds()
        self._clock = clock
        self._since: dict[Key, float] = {}
        self._due: dict[Key, float] = {}
        self._last_turn = -math.inf

    def asks(self, key: Key, waited: bool) -> bool:
        """``waited``: as its status has it. What was said of one that waited before this process began is in there."""
        if waited and key not in self._due:
            self._since[key] = -math.inf
            self._due[key] = self._turn()
        return not waited or self._clock() >= self._due[key]

    def again(self, key: Key, asked: bool) -> timedelta:
        """It waits. When to look at it again, if nothing happens."""
        now = self._clock()
        since = self._since.setdefault(key, now)
        if asked or key not in self._due:
            early = now + max(self._first, LONGER_EACH_TIME * (now - since))
            crowd = now + self._first + len(self._since) / WORDS_PER_SECOND
            self._due[key] = early if early < crowd else self._turn()
        return timedelta(seconds=max(0.0, self._due[key] - now))

    def forget(self, key: Key) -> None:
        self._since.pop(key, None)
        self._due.pop(key, None)

    def _turn(self) -> float:
        """One after the other, also of those that came together. Turns of those that have left it are not waited for."""
        soonest = self._clock() + self._first
        latest = soonest + len(self._since) / WORDS_PER_SECOND
        self._last_turn = min(max(soonest, self._last_turn + 1 / WORDS_PER_SECOND), latest)
        return self._last_turn
