"""When jobs end and when the next ones of their runs are made, as a watch of its own sees both."""

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from cluster.client import Cluster
from cluster.jobs import KINDS, Kind
from cluster.kube_http import stream

Object = dict[str, Any]


def ended(job: Object) -> bool:
    conditions = job.get("status", {}).get("conditions") or []
    return any(c["type"] in ("Succeeded", "Complete", "Failed") and c["status"] == "True" for c in conditions)


@dataclass
class Ends:
    """Of runs whose phases follow one another."""

    made: dict[str, dict[str, float]] = field(default_factory=dict)
    """Run to the names of its jobs, in their order, and the times at which they came."""
    ended: dict[str, float] = field(default_factory=dict)
    uids: dict[str, dict[str, str]] = field(default_factory=dict)
    """Run to the UIDs of all that were ever made, with their names."""

    def created(self, run: str) -> list[str]:
        """In their order; twice what was made twice."""
        return list(self.uids.get(run, {}).values())

    def told(self, event: Object) -> None:
        # Other tests' jobs are of no run.
        of_a_run = "alignment.dev/run" in event["object"]["metadata"].get("labels", {})
        if of_a_run and event["type"] in ("ADDED", "MODIFIED"):
            self.event(event["object"])

    def event(self, job: Object) -> None:
        now, metadata = time.time(), job["metadata"]
        self.uids.setdefault(metadata["labels"]["alignment.dev/run"], {})[metadata["uid"]] = metadata["name"]
        self.made.setdefault(metadata["labels"]["alignment.dev/run"], {}).setdefault(metadata["name"], now)
        if ended(job):
            self.ended.setdefault(metadata["name"], now)

    def gaps(self) -> list[float]:
        """Seconds from each job's end to the creation of the next one of its run."""
        found = []
        for jobs in self.made.values():
            names = list(jobs)
            found += [jobs[after] - self.ended[name] for name, after in pairwise(names) if name in self.ended]
        return found


@contextmanager
def watched_ends(cluster: Cluster, namespace: str = "", kind: Kind = KINDS["PyTorchJob"]) -> Iterator[Ends]:
    """Of one namespace, or of all."""
    ends, path = Ends(), f"{kind.path(namespace)}?watch=1"

    def watch() -> None:
        while True:
            with suppress(OSError, http.client.HTTPException, ValueError):  # the API server is restarted, in mid-line
                for line in stream(cluster, path):
                    ends.told(json.loads(line))
            time.sleep(0.2)

    # A daemon: it reads until the process, or the API server, ends.
    threading.Thread(target=watch, daemon=True).start()
    yield ends


def share(values: list[float], part: float) -> float:
    """The value below which this part of them lies."""
    ordered = sorted(values)
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)] if ordered else 0.0
