"""`alignctl status` of a workspace, and how any run's status is told."""

import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from controller import runs_folder
from controller.api import meta
from controller.api.problems import InvalidRun, Problem
from controller.api.status import Attempt, AttemptState, PhaseState, PhaseStatus, QueueState, RunStatus
from controller.commands.display import LiveTable, PlainLines, status_table
from controller.commands.find import find_run
from controller.commands.say import say
from controller.plan.decide import is_terminal
from controller.plan.verdict import duration

POLL_SECONDS = 1.0


def status_command(root: Path, run: str | None, watch: bool) -> int:
    name = find_run(root, run)
    if watch:
        follow_status(_frames(root, name))
    status, active = _read(root, name)
    print_status(headline(name, _state(status, active), status, counting=active), status)
    return ending(status) if watch else 0


def _read(root: Path, name: str) -> tuple[RunStatus, bool]:
    # Asked before the status is read: what a runner wrote last is then seen.
    active = runs_folder.holder(root) is not None and runs_folder.run_names(root)[:1] == [name]
    status = runs_folder.read_status(root, name)
    if status is None:
        raise InvalidRun([Problem(str(root / name), "no status.json: this run has not been started")])
    return (status if active or is_terminal(status) else _at_rest(status)), active


def _frames(root: Path, name: str) -> Iterator[RunStatus]:
    active = True
    while active:
        status, active = _read(root, name)
        yield status
        if active:
            time.sleep(POLL_SECONDS)


def _state(status: RunStatus, active: bool) -> str:
    if is_terminal(status):
        return status.phase.lower()
    return "running" if active else "interrupted; run it again to continue"


def _at_rest(status: RunStatus) -> RunStatus:
    """A killed runner leaves a status in which phases still run; nothing does."""
    stopped = {"state": PhaseState.WAITING, "message": "interrupted", "started_at": None, "progress": None}
    phases = tuple(p.model_copy(update=stopped) if p.state == PhaseState.RUNNING else p for p in status.phases)
    return status.model_copy(update={"phases": phases})


# ---------------------------------------------------------------- for workspaces and clusters alike


def headline(name: str, state: str, status: RunStatus, counting: bool) -> str:
    """`run helpful: running (3/8 phases, 41%, 12m30s)`; time counts on unless nothing runs."""
    done, _, share = status.progress.partition(" ")
    parts = [f"{done} phases" if done else "", share.strip("()")]
    if status.started_at is not None and (status.finished_at or counting):
        parts.append(duration(((status.finished_at or datetime.now(UTC)) - status.started_at).total_seconds()))
    told = ", ".join(part for part in parts if part)
    return f"run {name}: {state}" + (f" ({told})" if told else "")


def print_status(title: str, status: RunStatus) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(title, highlight=False, markup=False, soft_wrap=True)
    if status.phases:
        console.print(status_table(status, datetime.now(UTC)))
    for line in notes(status):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def follow_status(frames: Iterable[RunStatus]) -> None:
    console = Console()
    display = LiveTable(console) if console.is_terminal else PlainLines(say)
    with display:
        for status in frames:
            display.show(status)


def ending(status: RunStatus) -> int:
    return 0 if status.is_true(meta.SUCCEEDED) else 1


def notes(status: RunStatus) -> Iterator[str]:
    """What the table has no room for: conditions that need somebody, queues, what attempts said."""
    conditions = list(_conditions(status))
    yield from conditions
    if status.retry is not None and status.retry.refused:
        yield f"Not tried again: {status.retry.refused}"
    for phase in status.phases:
        if phase.queue is not None and phase.queue.state != QueueState.ADMITTED:
            yield _joined(f"{phase.name}: queue", str(phase.queue.state), phase.queue.message)
        yield from (_attempt(phase, a) for a in phase.attempts if _is_news(phase, a, conditions))


def _conditions(status: RunStatus) -> Iterator[str]:
    accepted = status.condition(meta.ACCEPTED)
    if accepted is not None and accepted.status == "False":
        # Such a run has failed too, in the same words.
        yield f"Not accepted: {accepted.message or accepted.reason}"
        return
    for kind in (meta.FAILED, meta.STALLED, meta.SUSPENDED):
        condition = status.condition(kind)
        if condition is not None and condition.status == "True":
            reason = "spec.suspend is true" if condition.reason == meta.RUN_SUSPENDED else condition.reason
            yield f"{kind}: {condition.message.removeprefix('suspended: ') or reason}"


def _is_news(phase: PhaseStatus, attempt: Attempt, told: Iterable[str]) -> bool:
    if phase.state == PhaseState.SUCCEEDED or not attempt.message or attempt.state == AttemptState.STOPPED:
        return False
    if attempt.state.ended and phase.digest not in (attempt.digest, None):
        return False
    return bool(attempt.node) or not any(attempt.message in line for line in told)


def _attempt(phase: PhaseStatus, attempt: Attempt) -> str:
    where = f" on {attempt.node}" if attempt.node else ""
    return _joined(
        f"{phase.name}, attempt {attempt.number}", f"{attempt.failure or attempt.state}{where}", attempt.message
    )


def _joined(*parts: str) -> str:
    return ": ".join(part for part in parts if part)
