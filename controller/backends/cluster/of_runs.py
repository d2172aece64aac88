"""What the backend remembers of runs between two looks. Of a run that was deleted nobody tells it: it is looked at no more."""

from datetime import datetime
from typing import Generic, TypeVar

T = TypeVar("T")

FORGOTTEN_SECONDS = 86400.0
"""After the last look. Twenty thousand runs in line are looked at every hour and a half."""


class OfRuns(Generic[T]):
    """By the run's UID, in the order of the last look."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[datetime, T]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, uid: str, thing: T, now: datetime) -> None:
        self._kept.pop(uid, None)
        self._kept[uid] = now, thing
        while (now - self._oldest()).total_seconds() > FORGOTTEN_SECONDS:
            del self._kept[next(iter(self._kept))]

    def get(self, uid: str, now: datetime) -> T | None:
        """Somebody looks at the run."""
        found = self.take(uid)
        if found is not None:
            self.put(uid, found, now)
        return found

    def take(self, uid: str) -> T | None:
        _, found = self._kept.pop(uid, (None, None))
        return found

    def _oldest(self) -> datetime:
        return next(iter(self._kept.values()))[0]
