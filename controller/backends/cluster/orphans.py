"""Pods whose job is gone, and how long they are waited for.

The garbage collector deletes those of phases within seconds, and they end within their grace. But whoever may create pods in a
namespace writes into theirs any labels, an owner that never was and that nobody collects (`kubeflow.org/v9`), and any grace; one
after the other. So they are waited for as long as a phase's could take in all, and no longer: after that the lease in the
folder keeps a second writer out (docs/adr/0020).
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from controller.api.run import AlignmentRun
from controller.api.template import Template
from controller.backends.cluster import evidence, ownership
from controller.backends.cluster.observe import PATIENCE_SECONDS
from controller.backends.cluster.of_runs import OfRuns
from controller.plan.resolve import merge_templates

Object = dict[str, Any]

COLLECTED_SECONDS = 120.0
"""Until the garbage collector has deleted a pod whose job is gone: seconds, but for one that is busy."""


class Orphans:
    def __init__(self) -> None:
        self._since: OfRuns[dict[str, datetime]] = OfRuns()
        """By phase: since when there has always been one."""

    def that_may_write(self, run: AlignmentRun, pods: Sequence[Object], now: datetime) -> list[Object]:
        """``pods``: all of the run's name whose job is gone."""
        key, going = run.metadata.uid or "", [pod for pod in pods if not evidence.has_ended(pod, now, PATIENCE_SECONDS)]
        before = self._since.take(key) or {}
        since = {phase: before.get(phase, now) for phase in map(ownership.phase_of, going)}
        if since:
            self._since.put(key, since, now)
        late = {phase: (now - begun).total_seconds() for phase, begun in since.items()}
        return [pod for pod in going if late[ownership.phase_of(pod)] < _patience(run, pod)]


def _patience(run: AlignmentRun, pod: Object) -> float:
    if pod["metadata"].get("deletionTimestamp") is None:
        return COLLECTED_SECONDS
    templates = [merge_templates(run.spec.template, entry.template) for entry in run.phases] or [Template()]
    return COLLECTED_SECONDS + max(template.grace_seconds for template in templates) + PATIENCE_SECONDS
