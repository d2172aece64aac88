"""`alignctl run`: from files and flags to a finished run, and what is said at its end."""

import asyncio
import os
import shlex
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from controller import runs_folder
from controller.api import meta
from controller.api.problems import InvalidRun, Problem
from controller.api.run import AlignmentRun, ObjectMeta
from controller.api.status import PhaseState, PhaseStatus, RunStatus
from controller.backends.local import process
from controller.backends.local.backend import Command, LocalBackend, phase_command
from controller.backends.local.machine import Machine, this_machine
from controller.commands.at_hand import missing
from controller.commands.display import LiveTable, PlainLines
from controller.commands.say import say
from controller.commands.table import comparison_table, plain_table, read_comparison
from controller.compose import Document, compose, read_document
from controller.plan import again
from controller.plan.explain import explain, select, unmet_inputs
from controller.plan.resolve import merge_templates, resolve
from controller.preflight import load_run
from controller.runner import Outcome, Runner
from trainers.phase_dir import PhaseDir

LOG_LINES = 15


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    file: Path
    fragments: tuple[Path, ...] = ()
    settings: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    start: tuple[str, ...] = ()
    workspace: Path = runs_folder.DEFAULT
    jobs: int | None = None
    anew: tuple[str, ...] = ()

    @property
    def base_dir(self) -> Path:
        """Relative paths in a run start at the run's file."""
        return self.file.resolve().parent

    def document(self) -> Document:
        return compose(read_document(self.file), [read_document(path) for path in self.fragments], self.settings)

    def load(self, local: bool = True) -> AlignmentRun:
        """``local``: as it is to run on this machine."""
        run = load_run(self.document(), self.base_dir, local=local)
        if unknown := [name for name in self.anew if name not in (*(entry.name for entry in run.phases), again.ALL)]:
            known = ", ".join(entry.name for entry in run.phases)
            raise InvalidRun([Problem("--anew", f'"{unknown[0]}" is not a phase of this run; phases are: {known}')])
        return run.model_copy(update={"status": self._status(run)})

    def _status(self, run: AlignmentRun) -> RunStatus:
        """What earlier invocations were asked to run anew stays so, finished or not; this one may ask for more.

        All else is on disk, or is begun afresh: that is what starting the command again is for.
        """
        known = runs_folder.read_status(self.workspace, run.name) or RunStatus()
        phases = (PhaseStatus(name=p.name, type=p.type, again=p.again) for p in known.phases if p.again)
        kept = RunStatus(phases=tuple(phases), retry=known.retry)
        if not self.anew:
            return kept
        number = max(int(time.time()), again.last(known) + 1)
        asked = {meta.ANNOTATION_RETRY: " ".join([str(number), *self.anew])}
        return again.obey(run.model_copy(update={"metadata": ObjectMeta(name=run.name, annotations=asked)}), kept)

    def selection(self, run: AlignmentRun) -> frozenset[str] | None:
        try:
            return select(run, self.only, self.start)
        except ValueError as error:
            raise InvalidRun([Problem("--only" if self.only else "--from", str(error))]) from error


def local_backend(request: Request, run: AlignmentRun, command: Command = phase_command) -> LocalBackend:
    machine = this_machine(os.environ)
    jobs = request.jobs or machine.default_jobs(_procs(run))
    return LocalBackend(request.workspace, request.base_dir, machine, jobs, os.environ, command)


def _procs(run: AlignmentRun) -> int:
    return max(merge_templates(run.spec.template, entry.template).procs_per_node or 1 for entry in run.phases)


def _check_gpus(machine: Machine, procs: int) -> None:
    if machine.gpus and procs > len(machine.gpus):
        count = len(machine.gpus)
        raise InvalidRun(
            [Problem("spec.template.procsPerNode", f"{procs}: each process needs a GPU, and this machine has {count}")]
        )


def _check_at_hand(workspace: Path, run: AlignmentRun, only: Collection[str] | None) -> None:
    """Of phases that have finished nothing is asked: their results are there."""
    known = runs_folder.read_status(workspace, run.name) or RunStatus()
    done = {phase.name for phase in known.phases if phase.state == PhaseState.SUCCEEDED}
    left = [phase.name for phase in run.phases if phase.name not in done and (only is None or phase.name in only)]
    if problems := missing(run, left, os.environ):
        raise InvalidRun(problems)


def run_command(request: Request, command: Command = phase_command) -> int:
    """Run to the end; tests put another program in the phases' place."""
    run = request.load()
    only = request.selection(run)
    backend = local_backend(request, run, command)
    _check_gpus(backend.machine, _procs(run))
    _check_at_hand(request.workspace, run, only)
    with runs_folder.locked(request.workspace):
        _settle(request.workspace, run.name, backend.grace)
        asyncio.run(_check_inputs(run, backend, only))
        runs_folder.write_run(request.workspace, run, request.document())
        return _drive(run, backend, request, only)


def _settle(root: Path, run: str, grace: float) -> None:
    """Phases of a runner that was killed are saving their work; two of a kind must not write at once."""
    directory = root / run
    if process.processes_under(directory):
        print("waiting for phases of an earlier, killed run to save their work and end", file=sys.stderr)
        process.end_all(directory, grace)


async def _check_inputs(run: AlignmentRun, backend: LocalBackend, only: Collection[str] | None) -> None:
    if only is None:
        return
    plans = explain(run, await backend.survey(run), only)
    if unmet := unmet_inputs(run, plans, only):
        raise InvalidRun([Problem("", text) for text in unmet])


def _drive(run: AlignmentRun, backend: LocalBackend, request: Request, only: Collection[str] | None) -> int:
    console = Console()
    display = LiveTable(console) if console.is_terminal else PlainLines(say)
    runner = Runner(run, backend, request.workspace, display, only)
    with display:
        outcome = asyncio.run(runner.drive())
    status = runner.run.status or RunStatus()
    if outcome == Outcome.INTERRUPTED:
        say(f"stopped. The same command continues where it was: alignctl run {continuing(request)}")
    elif outcome == Outcome.SUSPENDED:
        say("suspended: " + ", ".join(p.name for p in status.phases if p.state == PhaseState.SUSPENDED))
    report_rows(run, request.workspace)
    report_failures(status, run.name, backend)
    if outcome == Outcome.SUCCEEDED:
        report_results(run, request.workspace, console)
    return outcome.exit_status


def continuing(request: Request) -> str:
    """The arguments of the same command; what was to run anew stays so by itself."""
    repeated = {"-f": request.fragments, "--set": request.settings, "--only": request.only, "--from": request.start}
    words = [str(request.file)] + [
        str(word) for name, values in repeated.items() for one in values for word in (name, one)
    ]
    if request.workspace != runs_folder.DEFAULT:
        words += ["--workspace", str(request.workspace)]
    if request.jobs is not None:
        words += ["--jobs", str(request.jobs)]
    return shlex.join(words)


def report_rows(run: AlignmentRun, root: Path) -> None:
    """Of each finished phase the data of which rows were left out or used in part."""
    for phase in resolve(run):
        result = PhaseDir(root / run.name / phase.name).read_result()
        for record in result.data if result is not None else ():
            if not record.whole:
                say(f"{phase.name}: {record}")


def report_failures(status: RunStatus, run: str, backend: LocalBackend) -> None:
    """For each failed phase the class, what it said, and where to read on."""
    for phase in status.phases:
        if phase.state == PhaseState.FAILED:
            say("")
            say(f"phase {phase.name} failed: {_reason(phase)}", color="red", bold=True)
            _show_log(backend.log_file(run, phase.name))


def _reason(phase: PhaseStatus) -> str:
    return f"{phase.failure}: {phase.message}" if phase.failure else phase.message


def _show_log(log: Path | None) -> None:
    if log is None:
        return
    say(f"log: {log}")
    for line in process.tail(log, LOG_LINES):
        say(f"  {line}")


def report_results(run: AlignmentRun, root: Path, console: Console) -> None:
    """The table of every evaluation and the place of every report."""
    for phase in resolve(run):
        directory = root / run.name / phase.name
        comparison = read_comparison(directory / "results.json") if phase.type.produces == "evaluation" else None
        if comparison is not None:
            say("")
            if console.is_terminal:
                console.print(comparison_table(comparison))
            else:
                say("\n".join(plain_table(comparison)))
    reports = [
        root / run.name / phase.name / "report.html" for phase in resolve(run) if phase.type.produces == "package"
    ]
    for report in reports:
        if report.exists():
            say(f"\nreport: {report}")
