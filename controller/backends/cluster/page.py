"""Progress in a page of metrics: a few lines by their names, and numbers only that make sense. Pure."""

import re
from datetime import UTC, datetime

from controller.api.status import PhaseProgress
from trainers.metrics import PREFIX

WANTED = (
    "step", "total_steps", "checkpoint_step", "loss", "tokens_per_second", "eta_seconds", "last_step_timestamp_seconds", "info",
)  # fmt: skip

_NAMES = "|".join(WANTED)
LINE = re.compile(rf"^{PREFIX}({_NAMES})(?:\{{([^\n]{{0,1024}})\}})? ([-+.0-9eE]{{1,32}})\r?\n".encode(), re.MULTILINE)
PROCESSES = re.compile(rb'(?:^|,)processes="([0-9]{1,6})"')

MOST_STEPS = 10**12
LARGEST = 1e15
"""Of a loss or a rate: what is more has diverged, or is a lie."""
LONGEST_SECONDS = 10 * 366 * 86400.0

Figures = dict[str, float]


def progress_of(page: bytes, since: datetime, now: datetime) -> PhaseProgress | None:
    """None if the page is not a trainer's, or one's that has not begun its steps.

    How many steps there will be is known earlier, but it is no sign of life: a long loading before it would be a stall.
    ``since`` is when the pod began to run: before its first step it has been at work since then.
    """
    found = {name.decode(): (labels, value) for name, labels, value in LINE.findall(page)}
    figures = {name: value for name, (_, text) in found.items() if (value := _number(text)) is not None}
    step = _between(figures, "step", 0, MOST_STEPS)
    if step is None:
        return None
    total = _between(figures, "total_steps", step, MOST_STEPS)
    # Processes share the work evenly; this one knows its own part.
    rate = (_between(figures, "tokens_per_second", 0, LARGEST) or 0.0) * _processes(*found.get("info", ()))
    return PhaseProgress(
        step=int(step),
        total_steps=int(total or 0),
        checkpoint_step=int(_between(figures, "checkpoint_step", 0, step) or 0),
        loss=_between(figures, "loss", -LARGEST, LARGEST),
        tokens_per_second=rate if 0 < rate <= LARGEST else None,
        eta_seconds=_between(figures, "eta_seconds", 0, LONGEST_SECONDS) or None,
        updated_at=_updated(figures, since, now),
    )


def _number(text: bytes) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _between(figures: Figures, name: str, low: float, high: float) -> float | None:
    value = figures.get(name)
    return value if value is not None and low <= value <= high else None


def _processes(labels: bytes = b"", _: bytes = b"") -> int:
    found = PROCESSES.search(labels)
    return int(found[1]) if found else 1


def _updated(figures: Figures, since: datetime, now: datetime) -> datetime:
    """Not before the pod began, and not in time to come: a clock may be wrong, or a pod would never be stalled."""
    told = _between(figures, "last_step_timestamp_seconds", since.timestamp(), now.timestamp())
    if told is not None:
        return datetime.fromtimestamp(int(told), UTC)
    return now if figures.get("last_step_timestamp_seconds", 0.0) > now.timestamp() else since
