"""`alignctl plan`, `status`, `logs` and `stop`: looking at a workspace, from any terminal."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import typer
from rich.console import Console
from rich.table import Table

from controller import workspace
from controller.api import meta
from controller.api.problems import InvalidRun, Problem, nearest
from controller.api.status import PhaseState, RunStatus
from controller.backends.local import process
from controller.commands.display import status_table
from controller.commands.run import Request, local_backend
from controller.plan.decide import is_terminal
from controller.plan.explain import PhasePlan, explain
from controller.plan.verdict import duration

PLAN_COLOURS = {"reuse": "green", "run": "bold", "continue": "cyan", "skip": "dim"}


# ---------------------------------------------------------------- plan


def plan_command(request: Request) -> int:
    run = request.load()
    only = request.selection(run)
    plans = explain(run, asyncio.run(local_backend(request, run).survey(run)), only)
    console = Console()
    if console.is_terminal:
        console.print(_plan_table(plans))
    else:
        width = max(len(plan.name) for plan in plans)
        for plan in plans:
            typer.echo(f"{plan.name:<{width}}  {plan.type:<8}  {plan.action:<8}  {plan.why}")
    return 0


def _plan_table(plans: tuple[PhasePlan, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("phase", "type", "plan", "why"):
        table.add_column(name, style="dim" if name == "type" else None)
    for plan in plans:
        table.add_row(plan.name, plan.type, f"[{PLAN_COLOURS[plan.action]}]{plan.action}[/]", plan.why)
    return table


# ---------------------------------------------------------------- status


def status_command(root: Path, run: str | None) -> int:
    name = find_run(root, run)
    status = workspace.read_status(root, name)
    if status is None:
        raise InvalidRun([Problem(str(root / name), "no status.json: this run has not been started")])
    active = workspace.holder(root) is not None
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(headline(name, status, active), highlight=False)
    console.print(status_table(status if active or is_terminal(status) else _at_rest(status), datetime.now(UTC)))
    for kind in (meta.FAILED, meta.STALLED):
        condition = status.condition(kind)
        if condition is not None and condition.status == "True":
            console.print(f"{kind}: {condition.message}", highlight=False, markup=False)
    return 0


def headline(name: str, status: RunStatus, active: bool) -> str:
    state = status.phase
    if not active and not is_terminal(status):
        state = "interrupted; run it again to continue"
    elif active and not is_terminal(status):
        state = "running"
    spent = ""
    if status.started_at is not None and (status.finished_at or active):
        spent = f", {duration(((status.finished_at or datetime.now(UTC)) - status.started_at).total_seconds())}"
    return f"run {name}: {state.lower()} ({status.progress} phases{spent})"


def _at_rest(status: RunStatus) -> RunStatus:
    """A killed runner leaves a status in which phases still run; nothing does."""
    stopped = {"state": PhaseState.WAITING, "message": "interrupted", "started_at": None, "progress": None}
    phases = tuple(p.model_copy(update=stopped) if p.state == PhaseState.RUNNING else p for p in status.phases)
    return status.model_copy(update={"phases": phases})


def find_run(root: Path, run: str | None) -> str:
    """The run that is meant: the named one, else the one touched last."""
    names = workspace.run_names(root)
    if not names:
        raise InvalidRun(
            [Problem(str(root), "no run has been started in this workspace (another one: --workspace DIR)")]
        )
    if run is not None and run not in names:
        raise InvalidRun(
            [Problem(str(root), f'no run "{run}" here; runs are: {", ".join(names)}{nearest(run, names)}')]
        )
    return run or names[0]


# ---------------------------------------------------------------- logs


def logs_command(root: Path, run: str | None, phase: str | None, follow: bool) -> int:
    name = find_run(root, run)
    directory = root / name / (phase or _interesting_phase(root, name))
    numbers = process.attempt_numbers(directory)
    if not numbers:
        known = sorted(p.parent.name for p in (root / name).glob("*/attempts") if p.is_dir())
        shown = f"phases with logs are: {', '.join(known)}" if known else "no phase has any"
        raise InvalidRun([Problem(directory.name, f"no log in run {name}; {shown}")])
    if follow:
        _follow(root, directory)
    else:
        print(process.log_file(directory, numbers[-1]).read_text(errors="replace"), end="")
    return 0


def _interesting_phase(root: Path, run: str) -> str:
    """What runs, else what failed, else what ran last."""
    status = workspace.read_status(root, run) or RunStatus()
    for state in (PhaseState.RUNNING, PhaseState.FAILED, PhaseState.BACKING_OFF):
        for phase in status.phases:
            if phase.state == state:
                return phase.name
    ran = [p for p in status.phases if p.attempts and p.finished_at]
    if not ran:
        raise InvalidRun([Problem(run, "nothing has run yet, so there is no log")])
    return max(ran, key=lambda p: p.finished_at or datetime.min.replace(tzinfo=UTC)).name


def _follow(root: Path, directory: Path) -> None:
    """Print what is there and what comes, over further attempts, until the run ends."""
    for line in follow_lines(root, directory):
        print(line, end="", flush=True)


def follow_lines(root: Path, directory: Path, poll: float = 0.3) -> Iterator[str]:
    number, file = 0, None
    try:
        while True:
            active = workspace.holder(root) is not None
            newest = process.attempt_numbers(directory)[-1]
            if newest != number:
                if file is not None:
                    yield from file
                    file.close()
                number, file = newest, _open(process.log_file(directory, newest))
            assert file is not None
            yield from file
            if not active:
                return
            time.sleep(poll)
    finally:
        if file is not None:
            file.close()


def _open(path: Path) -> TextIO:
    return path.open(errors="replace")


# ---------------------------------------------------------------- stop


def _released(root: Path, timeout: float) -> bool:
    """Wait for the lock and not for the process: a process whose parent does not look stays as a zombie."""
    end = time.monotonic() + timeout
    while workspace.holder(root) is not None:
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def stop_command(root: Path, timeout: float) -> int:
    """Ask the runner to stop, as Ctrl-C would, and wait; end what a killed runner left."""
    pid = workspace.holder(root)
    if pid:
        os.kill(pid, signal.SIGTERM)
        typer.echo(f"stopping process {pid}: unfinished work is being saved")
        if not _released(root, timeout):
            typer.echo(f"process {pid} has not ended within {timeout:g} s", err=True)
            return 1
    left = process.end_all(root, grace=timeout) if root.is_dir() else 0
    if not pid and not left:
        typer.echo(f"nothing runs in {root}")
    else:
        typer.echo("stopped; run it again to continue")
    return 0
