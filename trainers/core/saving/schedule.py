"""When the clock says that it is time to save."""

import time

from trainers.spec import Checkpoint

LEAST = 60.0
"""Seconds between two saves, however little they cost."""
BACKGROUND = 10.0
"""How much more of the time may go by while files are written or uploaded than training may wait for."""


class Clock:
    """Saves as often as their cost allows: the dearer the last one was, the later the next."""

    def __init__(self, spec: Checkpoint) -> None:
        self.spec = spec
        self._waited = 0.0
        self._saved_at = time.monotonic()

    def saved(self, waited: float) -> None:
        """A save begins to be written, for which training stood still for so many seconds."""
        self._waited, self._saved_at = waited, time.monotonic()

    def is_due(self, written: float | None) -> bool:
        """``written``: seconds in which the last save was written; None while it still is."""
        passed = time.monotonic() - self._saved_at
        if self.spec.every_seconds is not None:
            return passed > self.spec.every_seconds
        if self.spec.time_share is None or written is None:
            return False
        return passed > shared_interval(self.spec.time_share, self._waited, written)


def shared_interval(share: float, waited: float, written: float) -> float:
    """Seconds between saves, of which waiting takes no more than ``share`` and writing no more than ten times that."""
    return max(LEAST, waited / share, written / min(1.0, BACKGROUND * share))
