"""`alignctl logs` of a run in a cluster."""

from controller.api import meta
from controller.api.problems import InvalidRun, Problem
from controller.commands.cluster.client import Cluster
from controller.commands.cluster.errors import ClusterError
from controller.commands.cluster.follow import follow_lines
from controller.commands.cluster.patience import patiently
from controller.commands.cluster.pods import Pod
from controller.commands.cluster.reading import FINAL, Wanted, find_phase, missing_peer, read, why_silent
from controller.commands.cluster.run import ClusterRun, newest
from controller.commands.find import interesting_phase
from controller.commands.logs import print_line
from controller.commands.say import say
from controller.commands.where import Place

NO_LOG = 1
"""As kubectl ends where there is no log yet, or any more. That a log is empty is no error to either."""


def cluster_logs(
    place: Place, name: str | None, phase: str | None, attempt: int | None, index: int, follow: bool
) -> int:
    cluster = Cluster(place)
    run = newest(patiently(cluster, cluster.runs, known=False), name, cluster.namespace)
    chosen = phase or (follow and _next_phase(run)) or interesting_phase(run.status) or _next_phase(run)
    if chosen is None:
        say(f"run {run.name} has ended, and nothing of it has run: {_end(run)}", err=True)
        return NO_LOG
    wanted = Wanted(run.name, find_phase(run, chosen).name, attempt, index)
    if not follow:
        return _print(cluster, wanted)
    for line in follow_lines(cluster, wanted, _Notes()):
        print_line(line)
    return 0


def _next_phase(run: ClusterRun) -> str | None:
    """What runs, else what runs next."""
    if run.ended:
        return None
    unfinished = [name for name in run.phases if find_phase(run, name).state not in FINAL]
    return next(iter([name for name in run.active_phases if name in unfinished] or unfinished), None)


def _end(run: ClusterRun) -> str:
    failed = run.status.condition(meta.FAILED)
    return failed.message if failed is not None and failed.status == "True" else run.state


def _print(cluster: Cluster, wanted: Wanted) -> int:
    reading = read(cluster, wanted)
    if reading.pod is not None and reading.pod.has_log:
        _print_all(cluster, reading.pod)
        if missing := missing_peer(cluster, reading):
            say(missing, err=True)
        return 0
    why = why_silent(cluster, reading)
    if reading.pods and reading.pod is None:
        raise InvalidRun([Problem("", why)])
    say(why, err=True)
    return NO_LOG


def _print_all(cluster: Cluster, pod: Pod) -> None:
    empty = True
    try:
        for line in cluster.log(pod):
            empty = False
            print_line(line.decode(errors="replace"))
    except ClusterError as error:
        raise ClusterError(f"the log of pod {pod.name} cannot be read: {error}", error.code) from error
    if empty:
        say(f"pod {pod.name} {'ended without a word' if pod.ended else 'runs and has printed nothing yet'}", err=True)


class _Notes:
    """What is not log goes to stderr, and is not said twice in a row."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, text: str) -> None:
        if text != self._last:
            say(text, err=True)
            self._last = text
