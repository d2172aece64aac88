"""Where the time of a step goes: sampling, scoring, update, other. Each moment counts for the innermost part that is open.

Knows nothing of either side, which say by functions of theirs when a part begins and ends.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

OTHER = "other"


class Split:
    """Seconds of the processor by part since the last look; of the clock where a GPU computes."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._open = [OTHER]
        self._seconds: dict[str, float] = {}
        self._mark = self._now()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Of what is inside; a decorator too."""
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def turn(self, name: str) -> None:
        """From now on what is outside of every part is this."""
        self._count()
        self._open[0] = name

    def spends(self, owner: Any, function: str, name: str) -> None:
        """An object's function is a part."""
        setattr(owner, function, self.part(name)(getattr(owner, function)))

    def taken(self) -> dict[str, float]:
        """What has gathered, which is forgotten."""
        self._count()
        found, self._seconds = self._seconds, {}
        return found

    def _count(self) -> None:
        now, name = self._now(), self._open[-1]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now

    def _now(self) -> float:
        if self._device == "cpu":
            return time.process_time()
        if (cuda := sys.modules["torch"].cuda).is_initialized():
            cuda.synchronize()
        return time.perf_counter()
