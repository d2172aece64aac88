"""`alignctl retry` and `rerun` of a run in a cluster."""

import time
from collections.abc import Sequence
from functools import partial

from controller.api import meta
from controller.api.problems import InvalidRun, Problem, nearest
from controller.api.status import PhaseStatus
from controller.commands.cluster.client import Cluster
from controller.commands.cluster.errors import ClusterError
from controller.commands.cluster.patience import patiently
from controller.commands.cluster.run import ClusterRun, newest
from controller.commands.cluster.status import existing
from controller.commands.say import say
from controller.commands.where import Place
from controller.plan import again
from controller.plan.refusal import is_refused
from trainers.contract import FailureClass

TRIES = 10
"""Between reading a run and writing to it, the operator may write its status."""


def cluster_retry(place: Place, name: str, phases: Sequence[str]) -> int:
    """Ask the operator to try failed phases again, or to run these, and what builds on them, anew."""
    cluster = Cluster(place)
    run = newest(patiently(cluster, cluster.runs, known=False), name, cluster.namespace)
    _check(run, phases)
    if run.leaving:
        raise InvalidRun([Problem(f"run {name}", "is being deleted: apply it once more when it is gone")])
    tried = [phase.name for phase in run.status.phases if again.can_try_again(phase)]
    if not phases and not tried:
        return _say_nothing_failed(run, place)
    _ask(cluster, run, phases)
    whole = again.ALL in phases
    what = "all phases run anew" if whole else f"{', '.join(phases)} and what builds on it: run anew" if phases else ""
    say(f"run {name}: {what or ', '.join(tried) + ' tries again'}")
    say(_when(run, place))
    for phase in run.suspended_phases:
        say(f"phase {phase} stays suspended: its own `suspend` is true")
    return 0


def _when(run: ClusterRun, place: Place) -> str:
    """What is asked for waits until the run makes sense, and until it may go on."""
    accepted = run.status.condition(meta.ACCEPTED)
    if accepted is not None and is_refused(run.status):
        return f"it begins when the run is valid: {accepted.message}"
    if run.asked_to_stop:
        return f"it is stopped, and begins with: {place.command('resume', run.name)}"
    return f"watch it with: {place.command('status --watch', run.name)}"


def _check(run: ClusterRun, phases: Sequence[str]) -> None:
    for name in phases:
        if name not in (*run.phases, again.ALL):
            known = f"phases are: {', '.join(run.phases)}{nearest(name, run.phases)}"
            raise InvalidRun([Problem("--from", f'"{name}" is not a phase of run {run.name}; {known}')])


def _say_nothing_failed(run: ClusterRun, place: Place) -> int:
    say(f"run {run.name} has no phase to try again: {run.state}")
    for phase in filter(_missed, run.status.phases):
        say(f"phase {phase.name} has finished and missed its gate: --from {phase.name} runs it anew")
    return 0


def _missed(phase: PhaseStatus) -> bool:
    return phase.failure == FailureClass.GATE_FAILED


def _ask(cluster: Cluster, run: ClusterRun, phases: Sequence[str]) -> None:
    """With a number that nobody has used, larger than all before it; whoever asks at the same moment has another."""
    for _ in range(TRIES):
        number = again.following(run.asked_again, run.status, int(time.time()))
        text = " ".join([str(number), *phases])
        if patiently(cluster, partial(cluster.annotate, run, meta.ANNOTATION_RETRY, text)):
            return
        run = existing(cluster, run.name)
    raise ClusterError(f"run {run.name} was written by others each time: try again")
