"""What time it is by the API server: waits, deadlines and ages are reckoned against what it has written.

Its answers have a date. Where this machine's clock agrees with it, that one counts, since it is finer; where it does not, time
goes on from the dates of the last answers by the clock that nobody sets.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from statistics import median

logger = logging.getLogger(__name__)

TOLERANCE = 5.0
"""Seconds that two clocks may differ by. Dates have whole seconds, and answers take a while."""
QUICK = 2.0
"""Seconds of an answer whose date says enough."""
ANSWERS = 9
"""One that has a wrong date, as from a proxy or one of several servers, does not count."""


def seconds_now() -> datetime:
    """Kubernetes' times have whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)


class Clock:
    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self._wall = wall
        self._steady = steady
        self._dates: deque[float] = deque(maxlen=ANSWERS)
        """When the steady clock stood at zero, by the date of each answer."""
        self._is_wrong = False

    def now(self) -> datetime:
        """In whole seconds."""
        own, ahead = self._wall(), self.ahead
        return datetime.fromtimestamp(int(own - ahead if abs(ahead) > TOLERANCE else own), UTC)

    @property
    def ahead(self) -> float:
        """Seconds by which this machine's clock is ahead of the API server's; 0 while nothing is known of that."""
        return self._wall() - (median(self._dates) + self._steady()) if self._dates else 0.0

    def dated(self, date: str, seconds: float) -> None:
        """An answer that took so long has this date."""
        try:
            written = parsedate_to_datetime(date).timestamp()
        except (ValueError, OverflowError):
            return
        if seconds > QUICK:
            return
        self._dates.append(written + 0.5 + seconds / 2 - self._steady())
        self._tell()

    def _tell(self) -> None:
        """Once, not with each answer."""
        ahead = self.ahead
        if (abs(ahead) > TOLERANCE) == self._is_wrong:
            return
        self._is_wrong = not self._is_wrong
        if self._is_wrong:
            way = "ahead of" if ahead > 0 else "behind"
            logger.warning(
                "this machine's clock is %.0f s %s the API server's, which is taken instead", abs(ahead), way
            )
        else:
            logger.info("this machine's clock agrees with the API server's again")
