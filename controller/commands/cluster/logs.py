"""`alignctl logs` of a run in a cluster."""

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


def cluster_logs(
    place: Place, name: str | None, phase: str | None, attempt: int | None, index: int, follow: bool
) -> int:
    cluster = Cluster(place)
    run = newest(patiently(cluster, cluster.runs, known=False), name, cluster.namespace)
    found = find_phase(run, phase or (follow and _next_phase(run)) or interesting_phase(run.status, run.name))
    wanted = Wanted(run.name, found.name, attempt, index)
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


def _print(cluster: Cluster, wanted: Wanted) -> int:
    reading = read(cluster, wanted)
    if reading.pod is not None and reading.pod.has_log:
        _print_all(cluster, reading.pod)
        if missing := missing_peer(cluster, reading):
            say(missing, err=True)
        return 0
    why = why_silent(cluster, reading)
    if reading.attempt is None or (reading.pods and reading.pod is None):
        raise InvalidRun([Problem("", why)])
    say(why, err=True)
    return 1 if reading.gone else 0


def _print_all(cluster: Cluster, pod: Pod) -> None:
    try:
        for line in cluster.log(pod):
            print_line(line.decode(errors="replace"))
    except ClusterError as error:
        raise ClusterError(f"the log of pod {pod.name} cannot be read: {error}", error.code) from error


class _Notes:
    """What is not log goes to stderr, and is not said twice in a row."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, text: str) -> None:
        if text != self._last:
            say(text, err=True)
            self._last = text
