"""The backend that runs phases as processes on this machine. Everything it must know again later is on disk."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from controller.api.run import AlignmentRun
from controller.api.status import PhaseProgress
from controller.backends import start
from controller.backends.local import process
from controller.backends.local.machine import Machine
from controller.backends.local.process import Handle, JobRecord
from controller.backends.local.results import Results
from controller.backends.local.warm import Starter
from controller.plan.job import PhaseJob
from controller.plan.observed import JobState, Observed, ObservedJob, ObservedResult
from controller.plan.resolve import resolve
from trainers.contract import JOB_VARIABLE, METRICS_PORT_VARIABLE, TERMINATION_VARIABLE, Identity
from trainers.files import write_atomic
from trainers.lease import FolderLease, Held, this_process
from trainers.origins import difference
from trainers.phase_dir import PhaseDir, adopt, set_aside
from trainers.phases import phase_type

Command = Callable[[PhaseJob, Path], Sequence[str]]
"""What to execute for a job and its phase file."""


def phase_command(job: PhaseJob, phase_file: Path) -> Sequence[str]:
    return [sys.executable, *start.program(job, phase_file, "--standalone", f"--nproc-per-node={job.procs_per_node}")]


@dataclass
class Live:
    """A process that we started."""

    phase: str
    root: Path
    handle: Handle
    record: JobRecord
    oom_kills: int
    """Of this machine, when it was started."""
    asked_to_stop: float | None = None
    """When, on the monotonic clock."""


class LocalBackend:
    """Holds the processes of one invocation; the workspace is locked while it does (:mod:`controller.runs_folder`)."""

    def __init__(
        self, workspace: Path, base_dir: Path, machine: Machine, jobs: int, environ: Mapping[str, str],
        command: Command = phase_command, grace: float = 30.0,
    ) -> None:  # fmt: skip
        self.workspace = workspace.resolve()
        self.base_dir = base_dir.resolve()
        self.machine = machine
        self.jobs = jobs
        self.environ = environ
        self.command = command
        self.grace = grace
        self.starter = Starter(machine.cores, machine.gpus)
        self.results = Results(self.workspace, self.base_dir)
        self._live: dict[str, Live] = {}
        self._ended: list[ObservedJob] = []

    # -- the three methods

    async def observe(self, run: AlignmentRun) -> Observed:
        self._reap()
        results = self._results(run)
        progress = {name: report for name, live in self._live.items() if (report := _progress(live))}
        jobs = (*self._past(run), *self._ended, *map(_observed_live, self._live.values()))
        return Observed(jobs=jobs, results=results, progress=progress, capacity=self.jobs)

    async def apply(self, run: AlignmentRun, job: PhaseJob) -> None:
        if job.phase in self._live:
            return
        root = self.root(run.name, job.phase)
        kind = phase_type(job.type)
        spec = kind.spec.model_validate(job.spec)
        found = self.results.finished(root, job.digest, kind, spec)
        if found == root:
            return
        if found is not None and _take_over(found, root, run.name):
            return
        gpus = self.machine.free_gpus(self._taken_gpus(), job.procs_per_node)
        if gpus is None:
            return
        identity = self.results.identity(job.digest, kind, spec) or Identity(digest=job.digest)
        with suppress(Held):  # by a process of another machine: the phase waits for it, and makes room itself
            _make_room(root, identity, run.name)
        self._start(job, root, gpus)

    async def delete(self, run: AlignmentRun, phase: str, attempt: int, seen: ObservedJob | None = None) -> None:
        """``seen`` says nothing more: only what was started here is in ``_live``."""
        live = self._live.get(phase)
        if live is None or live.record.attempt != attempt:
            return
        if live.asked_to_stop is None:
            live.asked_to_stop = time.monotonic()
            process.ask_to_stop(_tree(live))
        elif time.monotonic() - live.asked_to_stop > self.grace:
            process.kill(process.processes_under(live.root))

    async def reclaim(self, run: AlignmentRun, seen: ObservedJob) -> None:
        """Nobody can take a process from who has started it."""

    # -- more than the planner needs

    def root(self, run: str, phase: str) -> Path:
        return self.workspace / run / phase

    def log_file(self, run: str, phase: str, attempt: int | None = None) -> Path | None:
        root = self.root(run, phase)
        numbers = process.attempt_numbers(root)
        number = attempt if attempt is not None else (numbers[-1] if numbers else None)
        return process.log_file(root, number) if number in numbers and number is not None else None

    async def survey(self, run: AlignmentRun) -> Observed:
        """An observation with what `plan` wants to tell besides."""
        observed = await self.observe(run)
        works = {p.name: self.results.unfinished(self.root(run.name, p.name), p.type, p.spec) for p in resolve(run)}
        left = {name: work for name, work in works.items() if work is not None}
        return Observed(
            jobs=observed.jobs,
            results=observed.results,
            capacity=self.jobs,
            unfinished=left,
            elsewhere=self.results.by_digest(resolve(run)),
        )

    @property
    def live_phases(self) -> tuple[str, ...]:
        self._reap()
        return tuple(self._live)

    async def stop_all(self, run: AlignmentRun) -> None:
        """Ask everything to end. Call again to insist once the grace is over."""
        for live in list(self._live.values()):
            await self.delete(run, live.phase, live.record.attempt)

    def kill_all(self) -> None:
        for live in list(self._live.values()):
            process.kill([*_tree(live), *process.processes_under(live.root)])
            live.handle.wait()
        self.starter.close()
        self._reap()

    # -- details

    def _start(self, job: PhaseJob, root: Path, gpus: tuple[str, ...]) -> None:
        before = process.read_record(root)
        # A phase that goes on keeps its number of threads: another one would change its results in the last digits.
        keeps = before is not None and before.digest == job.digest
        chosen = self.machine.threads(self.jobs, job.procs_per_node, job.alone)
        threads = before.threads if keeps and before else chosen
        file = job.phase_file(str(self.workspace), str(self.base_dir))
        write_atomic(PhaseDir(root).phase_file, file.model_dump_json(by_alias=True, indent=1, exclude_unset=True))
        process.termination_file(root, job.attempt).unlink(missing_ok=True)
        environ = self._environment(job, root, threads, gpus)
        command = self.command(job, PhaseDir(root).phase_file)
        starved_before = process.oom_kills()
        own = {item.name: item.value for item in job.template.env}
        handle = self.starter.start(command, environ, process.log_file(root, job.attempt), own)
        record = process.record_of(handle, job.attempt, job.digest, threads, gpus)
        process.write_record(root, record)
        self._live[job.phase] = Live(job.phase, root, handle, record, starved_before)

    def _environment(self, job: PhaseJob, root: Path, threads: int, gpus: tuple[str, ...]) -> dict[str, str]:
        ours = {
            JOB_VARIABLE: str(root),
            TERMINATION_VARIABLE: str(process.termination_file(root, job.attempt)),
            METRICS_PORT_VARIABLE: "0",
        }
        environ = {**self.environ, **start.environment(job, {"OMP_NUM_THREADS": str(threads)}, ours)}
        return environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else environ

    def _taken_gpus(self) -> set[str]:
        return {gpu for live in self._live.values() for gpu in live.record.gpus}

    def _reap(self) -> None:
        for live in list(self._live.values()):
            status = live.handle.poll()
            if status is None:
                continue
            process.kill(process.processes_under(live.root))
            self._ended.append(_observed_end(live, status))
            del self._live[live.phase]

    def _past(self, run: AlignmentRun) -> list[ObservedJob]:
        """Attempts of earlier invocations: their numbers are taken."""
        known = {(job.phase, job.attempt) for job in self._ended}
        known |= {(live.phase, live.record.attempt) for live in self._live.values()}
        return [
            ObservedJob(entry.name, number, "", JobState.FAILED, past=True)
            for entry in run.phases
            for number in process.attempt_numbers(self.root(run.name, entry.name))
            if (entry.name, number) not in known
        ]

    def _results(self, run: AlignmentRun) -> dict[str, ObservedResult]:
        """A phase counts as finished once its process has ended too, so that its memory is free for the next one."""
        found = {
            phase.name: self.results.of_phase(self.root(run.name, phase.name), phase.type, phase.spec)
            for phase in resolve(run)
            if phase.name not in self._live
        }
        return {name: result for name, result in found.items() if result is not None}


def _tree(live: Live) -> list[psutil.Process]:
    """The started process alone: torchrun passes a signal on, and a second one would cut its workers' saving short."""
    try:
        return [psutil.Process(live.record.pid)]
    except psutil.NoSuchProcess:
        return []


def _take_over(found: Path, root: Path, run: str) -> bool:
    """Whether the phase is done with that. It is not if a process of another machine has the folder: the phase waits for it."""
    try:
        with FolderLease(root, this_process(run), patience=0):
            set_aside(root)
            adopt(found, root)
            process.job_file(root).unlink(missing_ok=True)
    except Held:
        return False
    return True


def _make_room(root: Path, identity: Identity, run: str) -> None:
    """Leave only unfinished work of this identity in the phase's directory. Logs go with the work they belong to."""
    directory = PhaseDir(root)
    then = directory.read_identity()
    other = directory.holds_work and (then is None or difference(identity, then) is not None)
    if other or directory.result.exists():
        with FolderLease(root, this_process(run), patience=0):
            set_aside(root)
    root.mkdir(parents=True, exist_ok=True)


def _progress(live: Live) -> PhaseProgress | None:
    """The attempt's last report; what an earlier attempt reported is old news."""
    report = PhaseDir(live.root).read_progress()
    if report is None or report.updated_at < live.record.started_at.timestamp():
        return None
    return PhaseProgress(
        step=report.step,
        total_steps=report.total_steps,
        loss=report.loss,
        tokens_per_second=report.tokens_per_second,
        eta_seconds=report.eta_seconds,
        checkpoint_step=report.checkpoint_step,
        stage=report.stage,
        updated_at=datetime.fromtimestamp(report.updated_at, UTC),
    )


def _observed_live(live: Live) -> ObservedJob:
    return ObservedJob(
        live.phase, live.record.attempt, live.record.digest, JobState.LIVE, started_at=live.record.started_at
    )


def _observed_end(live: Live, status: int) -> ObservedJob:
    starved = process.oom_kills() > live.oom_kills
    failure, message = process.classify(status, live.root, live.record.attempt, starved)
    return ObservedJob(
        phase=live.phase,
        attempt=live.record.attempt,
        digest=live.record.digest,
        state=JobState.SUCCEEDED if failure is None else JobState.FAILED,
        failure=failure,
        message=message,
        started_at=live.record.started_at,
        finished_at=datetime.now(UTC),
    )
