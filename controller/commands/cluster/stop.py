"""`alignctl stop` and `resume` of a run in a cluster."""

import time

from controller.commands.cluster.client import Cluster
from controller.commands.cluster.patience import patiently
from controller.commands.cluster.run import ClusterRun, the_one
from controller.commands.cluster.status import existing
from controller.commands.say import say
from controller.commands.where import Place

POLL_SECONDS = 1.0


def cluster_stop(place: Place, name: str | None, timeout: float) -> int:
    """Suspend a run and wait until nothing of it runs."""
    cluster = Cluster(place)
    runs = patiently(cluster, cluster.runs, known=False)
    run = the_one(runs, name, [run for run in runs if not run.ended], cluster.namespace)
    if run.ended:
        return _say_ended(run)
    patiently(cluster, lambda: cluster.suspend(run.name, True))
    say(f"stopping run {run.name}: unfinished work is being saved")
    return _await(cluster, place, run.name, timeout)


def _await(cluster: Cluster, place: Place, name: str, timeout: float) -> int:
    end, told = time.monotonic() + timeout, ""
    while not (run := existing(cluster, name)).stopped:
        if run.ended:
            return _say_ended(run)
        waiting = ", ".join(run.active_phases)
        if run.settled and waiting and waiting != told:
            say(f"waiting for {waiting}")
            told = waiting
        if time.monotonic() > end:
            say(_late(run, timeout), err=True)
            return 1
        time.sleep(POLL_SECONDS)
    say(f"stopped; it continues with: {place.command('resume', name)}")
    return 0


def _late(run: ClusterRun, timeout: float) -> str:
    if not run.settled:
        return f"the operator has not seen it within {timeout:g} s: is it running? The run stays marked to be stopped"
    return f"not stopped within {timeout:g} s, the operator goes on with it: {', '.join(run.active_phases)}"


def _say_ended(run: ClusterRun) -> int:
    say(f"run {run.name} has ended: {run.state}")
    return 0


def cluster_resume(place: Place, name: str | None) -> int:
    cluster = Cluster(place)
    runs = patiently(cluster, cluster.runs, known=False)
    run = the_one(runs, name, [run for run in runs if run.asked_to_stop and not run.ended], cluster.namespace)
    if run.ended:
        return _say_ended(run)
    if run.asked_to_stop:
        patiently(cluster, lambda: cluster.suspend(run.name, False))
        say(f"run {run.name} goes on; watch it with: {place.command('status --watch', run.name)}")
    else:
        say(f"run {run.name} is not stopped: {run.state}")
    for phase in run.suspended_phases:
        say(f"phase {phase} stays suspended: its own `suspend` is true")
    return 0
