"""What is known of the pod whose log is wanted, and why there is no log yet or any more."""

from collections.abc import Sequence
from dataclasses import dataclass

from controller.api.problems import InvalidRun, Problem, nearest
from controller.api.status import Attempt, PhaseState, PhaseStatus, QueueState
from controller.commands.cluster.client import Cluster
from controller.commands.cluster.patience import patiently
from controller.commands.cluster.pods import Pod, of_attempt
from controller.commands.cluster.run import ClusterRun
from controller.commands.cluster.status import existing
from controller.plan.job import job_name

FINAL = (PhaseState.SUCCEEDED, PhaseState.FAILED, PhaseState.BLOCKED, PhaseState.NOT_SELECTED)


@dataclass(frozen=True)
class Wanted:
    """A log that somebody asks for."""

    run: str
    phase: str
    attempt: int | None = None
    """The newest one unless set."""
    index: int = 0


@dataclass(frozen=True)
class Reading:
    """One look at the run and at the pods of the phase."""

    run: ClusterRun
    phase: PhaseStatus
    attempt: int | None
    """None: nothing was ever started."""
    pods: dict[int, Pod]
    """The attempt's, by index."""
    index: int
    all_pods: tuple[Pod, ...] = ()
    """Of all attempts."""

    @property
    def pod(self) -> Pod | None:
        return self.pods.get(self.index)

    @property
    def record(self) -> Attempt | None:
        return next((a for a in self.phase.attempts if a.number == self.attempt), None)

    @property
    def gone(self) -> bool:
        """The attempt has ended and its pods were removed."""
        return self.attempt is not None and not self.pods and (self.record is None or self.record.state.ended)


def read(cluster: Cluster, wanted: Wanted) -> Reading:
    run = existing(cluster, wanted.run)
    pods = patiently(cluster, lambda: cluster.pods(wanted.run, wanted.phase))
    return reading_of(run, pods, wanted)


def reading_of(run: ClusterRun, pods: Sequence[Pod], wanted: Wanted) -> Reading:
    phase = find_phase(run, wanted.phase)
    pods = [pod for pod in pods if _is_of(run, phase, pod)]
    # The status keeps only the last few as they were; of the newest one it may not know yet.
    numbers = [attempt.number for attempt in phase.attempts] + [pod.attempt for pod in pods]
    attempt = wanted.attempt or max(numbers, default=None)
    return Reading(run, phase, attempt, of_attempt(pods, attempt or 0), wanted.index, tuple(pods))


def _is_of(run: ClusterRun, phase: PhaseStatus, pod: Pod) -> bool:
    """Whether its job is one of the phase's: labels like ours may be on anybody's pods."""
    record = next((a for a in phase.attempts if a.number == pod.attempt), None)
    called = (record.job if record else "") or job_name(run.name, phase.name, pod.attempt)
    return pod.job == called and not (record and record.taken_by)


def find_phase(run: ClusterRun, name: str) -> PhaseStatus:
    names = run.phases
    if name not in names:
        text = f"not a phase of run {run.name}; phases are: {', '.join(names)}{nearest(name, names)}"
        raise InvalidRun([Problem(name, text)])
    return run.status.phase_status(name) or PhaseStatus(name=name, type="")


def is_over(reading: Reading, wanted: Wanted) -> bool:
    """Nothing more will be printed."""
    if wanted.attempt is not None and (reading.gone or (reading.record is not None and reading.record.state.ended)):
        return True
    return reading.run.ended or (reading.run.settled and reading.phase.state in FINAL)


def why_silent(cluster: Cluster, reading: Reading) -> str:
    """Why there is no log, in one line."""
    if reading.pod is not None:
        return _not_running(cluster, reading.pod)
    if reading.attempt is None:
        return f"phase {reading.phase.name} was not started: {_state(reading)}"
    if reading.pods:
        known = ", ".join(map(str, sorted(reading.pods)))
        return f"no pod {reading.index} of {_name(reading)}; its pods are: {known}"
    return f"{_name(reading)}: {_without_pods(reading)}"


def missing_peer(cluster: Cluster, reading: Reading) -> str:
    """A pod for which the one that is read waits, in one line; empty if all of the attempt run, or it waits no more."""
    if reading.pod is None or reading.pod.ended:
        return ""
    missing = next((pod for pod in reading.pods.values() if not pod.has_log and not pod.ended), None)
    return f"{_not_running(cluster, missing)}; the attempt's other pods wait for it" if missing else ""


def _not_running(cluster: Cluster, pod: Pod) -> str:
    reason = pod.holdup or cluster.warning(pod) or pod.stage
    return f"pod {pod.name} {'never ran' if pod.ended else 'does not run yet'}: {reason}"


def _name(reading: Reading) -> str:
    return f"{reading.phase.name}, attempt {reading.attempt}"


def _without_pods(reading: Reading) -> str:
    queue, record = reading.phase.queue, reading.record
    if not reading.gone:
        if queue is not None and queue.state != QueueState.ADMITTED:
            return f"waits in its queue ({queue.state}): {queue.message}"
        return (record.message if record else "") or "its pods have not been made yet"
    if record is None:
        numbers = [a.number for a in reading.phase.attempts] + [pod.attempt for pod in reading.all_pods]
        last = max(numbers, default=0)
        if (reading.attempt or 0) > last:
            return f"there was none; the last is attempt {last}" if last else "there was none yet"
        return "nothing is left of it"
    told = ": ".join(filter(None, (str(record.failure or record.state), record.message)))
    return f"its pods are gone and their logs with them. It ended with {told}"


def _state(reading: Reading) -> str:
    phase = reading.phase
    if not reading.run.status.conditions:
        return "the operator has not seen the run yet"
    if phase.state == PhaseState.SUCCEEDED:
        return "an earlier result is reused"
    return ": ".join(filter(None, (str(phase.state), phase.message)))
