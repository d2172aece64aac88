"""How a running run looks: a live table on a terminal, timestamped lines in a log."""

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from textwrap import shorten

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from controller.api.status import PhaseProgress, PhaseState, PhaseStatus, RunStatus
from controller.plan.verdict import duration

QUEUED = "Queued"

COLOURS: dict[str, str] = {
    QUEUED: "yellow",
    PhaseState.RUNNING: "bold cyan",
    PhaseState.SUCCEEDED: "green",
    PhaseState.FAILED: "bold red",
    PhaseState.BLOCKED: "red",
    PhaseState.BACKING_OFF: "yellow",
    PhaseState.SUSPENDED: "yellow",
}

REMARK_WIDTH = 90
"""Characters of the last column; a longer one would take the others' room."""
PROGRESS_EVERY_SECONDS = 10.0


def elapsed(phase: PhaseStatus, now: datetime) -> float | None:
    at_rest = phase.state == PhaseState.SUSPENDED and phase.finished_at is None
    if phase.started_at is None or at_rest:
        return None
    return ((phase.finished_at or now) - phase.started_at).total_seconds()


def status_table(status: RunStatus, now: datetime) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("phase")
    table.add_column("type", style="dim")
    table.add_column("state")
    for name in ("step", "loss", "tok/s", "ETA", "elapsed"):
        table.add_column(name, justify="right")
    table.add_column("", style="dim", overflow="ellipsis", no_wrap=True)
    for phase in status.phases:
        word = state_word(phase)
        state = f"[{COLOURS.get(word, COLOURS.get(phase.state, 'dim'))}]{word}[/]"
        spent = elapsed(phase, now)
        table.add_row(
            phase.name,
            phase.type,
            state,
            *figures(phase.progress),
            duration(spent) if spent is not None else "",
            escape(shorten(remark(phase), REMARK_WIDTH, placeholder=" …")),
        )
    return table


def state_word(phase: PhaseStatus) -> str:
    """Reused results never ran here, and what waits in a queue does not run yet."""
    if phase.waits_in_queue:
        return QUEUED
    reused = phase.state == PhaseState.SUCCEEDED and not phase.attempts
    return "Reused" if reused else str(phase.state)


def figures(progress: PhaseProgress | None) -> tuple[str, str, str, str]:
    if progress is None:
        return "", "", "", ""
    return (
        f"{progress.step}/{progress.total_steps}" if progress.total_steps else "",
        f"{progress.loss:.4f}" if progress.loss is not None else "",
        f"{progress.tokens_per_second:,.0f}" if progress.tokens_per_second is not None else "",
        duration(progress.eta_seconds) if progress.eta_seconds else "",
    )


def remark(phase: PhaseStatus) -> str:
    if phase.state == PhaseState.RUNNING and phase.progress is not None and phase.progress.stage:
        return phase.progress.stage
    return phase.message


class LiveTable:
    """A table that is redrawn in place."""

    def __init__(self, console: Console) -> None:
        self.console = console
        # We redraw ourselves: a thread of rich's own would only add work.
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> "LiveTable":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, status: RunStatus) -> None:
        self._live.update(status_table(status, datetime.now(UTC)), refresh=True)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)


class PlainLines:
    """A line when a phase changes state, and one per running phase every few seconds."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._states: dict[str, tuple[str, int]] = {}
        self._told: dict[str, float] = {}

    def __enter__(self) -> "PlainLines":
        return self

    def __exit__(self, *_: object) -> None:
        return

    def say(self, text: str) -> None:
        self._write(f"{datetime.now().astimezone():%H:%M:%S} {text}")

    def show(self, status: RunStatus) -> None:
        for phase in status.phases:
            for line in self._news(phase):
                self.say(f"{phase.name}: {line}")

    def _news(self, phase: PhaseStatus) -> Iterator[str]:
        mark = (state_word(phase), phase.tries)
        if self._states.get(phase.name) != mark and phase.state not in (PhaseState.WAITING, PhaseState.READY):
            self._told[phase.name] = self._clock()
            yield transition(phase)
        elif phase.state == PhaseState.RUNNING and phase.progress is not None and self._due(phase.name):
            yield progress_line(phase.progress)
        self._states[phase.name] = mark

    def _due(self, name: str) -> bool:
        due = self._clock() - self._told.get(name, 0.0) >= PROGRESS_EVERY_SECONDS
        if due:
            self._told[name] = self._clock()
        return due


def transition(phase: PhaseStatus) -> str:
    text = state_word(phase).lower()
    if text == QUEUED.lower() and phase.queue is not None:
        return ": ".join(filter(None, (text, phase.queue.message)))
    if phase.state == PhaseState.RUNNING:
        # Counted within this invocation; the numbers in names also count earlier ones.
        return "started" if phase.tries <= 1 else f"started again, attempt {phase.tries}"
    if phase.state == PhaseState.SUCCEEDED and phase.attempts:
        spent = elapsed(phase, datetime.now(UTC))
        return f"{text} in {duration(spent)}" if spent is not None else text
    reason = f"{phase.failure}: {phase.message}" if phase.failure else phase.message
    return f"{text}: {reason}" if reason and reason != text else text


def progress_line(progress: PhaseProgress) -> str:
    step, loss, rate, eta = figures(progress)
    parts = (
        f"step {step}" if step else "",
        f"loss {loss}" if loss else "",
        f"{rate} tok/s" if rate else "",
        f"ETA {eta}" if eta else "",
    )
    text = ", ".join(part for part in (*parts, progress.stage) if part)
    return text or "working"
