"""A log as it grows, over broken connections, further attempts and pods that a queue stops and starts again."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from controller.commands.cluster.client import Cluster
from controller.commands.cluster.errors import ClusterError
from controller.commands.cluster.pods import Pod
from controller.commands.cluster.reading import Reading, Wanted, is_over, missing_peer, read, why_silent

POLL_SECONDS = 1.0
TRIES = 5
"""Before a pod is left for that of the next attempt."""
OVERLAP_SECONDS = 60
"""A connection that broke is made up for from so long before its last line: a line takes time to get here."""


@dataclass
class Mark:
    """How far a pod's log has been read."""

    last: bytes = b""
    """Time of the last line, as the kubelet wrote it."""
    seen: float = field(default_factory=time.monotonic)
    """When that was, by the clock here."""
    whole: bool = False
    """Nothing will be added and nothing is missing."""
    failures: int = 0
    """Tries to read on that gave nothing."""

    @property
    def is_done(self) -> bool:
        """Not worth waiting for: the node of a pod that was lost never answers."""
        return self.whole or self.failures >= TRIES

    @property
    def since_seconds(self) -> int | None:
        return int(time.monotonic() - self.seen) + OVERLAP_SECONDS if self.last else None


def follow_lines(
    cluster: Cluster, wanted: Wanted, note: Callable[[str], None], poll: float = POLL_SECONDS
) -> Iterator[str]:
    """Lines until the phase or the run has ended; ``note`` is told what happens meanwhile."""
    marks: dict[str, Mark] = {}
    while True:
        reading = read(cluster, wanted)
        pod = _unfinished(reading, marks) or reading.pod
        if pod is not None and pod.has_log:
            if marks and pod.uid not in marks:
                note(f"attempt {pod.attempt}: pod {pod.name}")
            mark = marks.setdefault(pod.uid, Mark())
            if missing := missing_peer(cluster, reading):
                note(missing)
            if not mark.whole:
                yield from _more(cluster, pod, mark, note)
            done = mark.is_done
        else:
            done = True
            if not (marks and reading.gone):
                note(why_silent(cluster, reading))
        if done and is_over(reading, wanted):
            return
        time.sleep(poll)


def _unfinished(reading: Reading, marks: Mapping[str, Mark]) -> Pod | None:
    """A pod whose end is still to be read, though the next attempt may have begun."""
    return next((pod for pod in reading.all_pods if pod.uid in marks and not marks[pod.uid].is_done), None)


def _more(cluster: Cluster, pod: Pod, mark: Mark, note: Callable[[str], None]) -> Iterator[str]:
    # Known before reading: only what had ended before is then read to its end.
    ended = pod.ended
    try:
        yield from _fresh(cluster.log(pod, follow=True, since_seconds=mark.since_seconds), mark)
        mark.whole = ended
    except ClusterError as error:
        if error.code == 403:
            raise
        mark.failures += 1
        note(f"the log of pod {pod.name} cannot be read on: {error}")


def _fresh(lines: Iterator[bytes], mark: Mark) -> Iterator[str]:
    """Lines without their times, and without those at the beginning that were printed before."""
    again = bool(mark.last)
    for line in lines:
        moment, _, text = line.partition(b" ")
        if not moment[:1].isdigit():  # a word of the kubelet's own
            yield line.decode(errors="replace")
            continue
        # Only at the beginning: clocks of nodes may be set back, and times go with a time zone.
        if again and moment <= mark.last:
            continue
        again = False
        mark.last, mark.seen, mark.failures = moment, time.monotonic(), 0
        yield text.decode(errors="replace")
