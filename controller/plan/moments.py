"""Times that are reckoned from others. There is an answer for any, also where the calendar ends."""

from datetime import UTC, datetime, timedelta

NEVER = datetime.max.replace(tzinfo=UTC)


def later(start: datetime, seconds: float) -> datetime:
    """``start`` and so many seconds. A wait that no calendar holds never ends."""
    try:
        return start + timedelta(seconds=seconds)
    except OverflowError:
        return NEVER
